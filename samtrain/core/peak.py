"""How fast a device could be at best: the divisor of MFU."""

import time

import torch

# Dense bf16 tensor-core peaks from the data sheets, TFLOP/s.
DATA_SHEET_BF16 = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0}


def peak_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """TFLOP/s and where the figure comes from: the data sheet for known GPUs in bf16, else a matmul measured now."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, peak in DATA_SHEET_BF16.items():
            if model in name:
                return peak, f"data sheet of {model}, dense bf16"
    size = 8192 if device.type == "cuda" else 1024
    return _measured(device, dtype, size), f"matmul of {size} measured at start, {str(dtype).removeprefix('torch.')}"


def _measured(device: torch.device, dtype: torch.dtype, size: int) -> float:
    # A generator of its own: the run's random numbers, dropout's among them, must not depend on a measurement.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        since = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - since)
    return 2.0 * size**3 / best / 1e12


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
