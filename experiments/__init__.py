"""Recipes, one a file: `python experiments/X.py` or `python -m experiments.X`, and `from experiments import X`."""
