"""Training of classical control as compiled functions, for experiments/control.py and experiments/maze.py."""
