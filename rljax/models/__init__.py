"""The decoder and its heads, caches, adapters and Hugging Face files."""
