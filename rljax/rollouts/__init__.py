"""Rollouts: completions sampled from a language model, episodes of an environment."""
