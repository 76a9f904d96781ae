"""The decoder, its cache and heads, Hugging Face files, the policy as the trainer sees it, and an MLP."""
