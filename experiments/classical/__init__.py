"""Whole training runs of classical control, each one compiled function; experiments/control.py and maze.py run them."""
