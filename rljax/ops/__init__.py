"""Arrays to arrays: the mathematics of every algorithm."""
