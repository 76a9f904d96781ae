"""How good it was: verifiers, reward models, judges, and the pool that isolates them."""
