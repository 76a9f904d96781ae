"""Environments: pure ones that compile, and text ones in turns."""
