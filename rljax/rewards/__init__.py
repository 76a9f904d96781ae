"""Verifiers, the pool that isolates them, and the scores and rewards made of their results."""
