"""Speed, memory and launches of the two-stream Q-Former's operations: `python -m benchmarks.kernels`."""
