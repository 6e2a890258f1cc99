"""ZeRO-3 on 8 to 1,024 GPUs, by arithmetic and by simulation: `python -m benchmarks.scaling`."""
