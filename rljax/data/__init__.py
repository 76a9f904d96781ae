"""Prompts, preferences, chat templates, packing."""
