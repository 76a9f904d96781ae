"""Exact expectations over a language model whose answers can be listed: what estimators.py is made of."""
