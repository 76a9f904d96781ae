"""Exact expectations over a language model whose completions can be listed, for experiments/tables/estimators.py."""
