"""Measurements of samtrain; each writes what it saw, with machine and versions, to benchmarks/results/."""
