"""Objective to update, and what a long run needs: sharding, checkpoints, logs."""
