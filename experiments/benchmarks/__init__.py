"""What the hardware could do and what rljax does, side by side: `python experiments/benchmarks/X.py`."""
