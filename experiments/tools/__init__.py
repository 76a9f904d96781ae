"""Tools for a model directory or a run: export, generate, check_parity."""
