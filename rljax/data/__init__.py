"""Prompts, tokenizers, demonstrations, and tasks that the code makes itself."""
