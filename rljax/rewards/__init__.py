"""How good it was: verifiers, and the pool that isolates them."""
