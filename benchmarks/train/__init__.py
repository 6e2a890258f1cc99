"""Whole training steps of the published shapes, and what users would run instead: `python -m benchmarks.train`."""
