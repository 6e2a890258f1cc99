"""Where and with what a run was made: the header of every table and file."""

import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import samtrain_kernels
import torch

from benchmarks.kernels.floors import Rates
from benchmarks.kernels.shapes import Shape
from samtrain.core.versions import git_commit, versions

_SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "power.draw",
    "temperature.gpu",
)


def header(device: torch.device, *, rates: Rates | None) -> dict[str, Any]:
    """GPU (or the statement that there is none), clocks, power, driver, versions, commit, settings."""
    found: dict[str, Any] = {
        "device": device.type,
        "commit": git_commit(),
        "settings_sha256": settings_hash(),
        "versions": {
            name: v for name, v in versions().items() if name in ("python", "torch", "triton", "transformers")
        },
        "platform": platform.machine(),
    }
    if device.type != "cuda":
        return found | {"gpu": None}
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "smi": _smi(),
    }
    if rates is not None:
        found |= {"copy_bytes_per_second": rates.bytes, "matmul_flops_per_second": rates.flops}
    return found


def headline(found: dict[str, Any]) -> list[str]:
    """The first lines of every text."""
    v = found["versions"]
    software = f"torch {v['torch']} triton {v['triton']} | commit {found['commit'][:12]}"
    software += f" | settings {found['settings_sha256'][:12]}"
    if found["gpu"] is None:
        return [
            "NO GPU: this machine has none, and no GPU has run what follows.",
            "Here: launches, operations, bytes and memory kept for backward, all counted, and correctness. No times:",
            "a CPU's would say nothing about a kernel.",
            software,
        ]
    smi = found["smi"]
    gpu = f"{found['gpu']} {found['memory_bytes'] / 1e9:.0f} GB | driver {smi.get('driver_version', '?')}"
    gpu += f" | clocks {smi.get('clocks.sm', '?')} of {smi.get('clocks.max.sm', '?')}"
    gpu += f" | power limit {smi.get('power.limit', '?')}"
    rates = (
        f"copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"matmul {found['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s, both measured in this run"
        if "copy_bytes_per_second" in found
        else "rates not measured"
    )
    return [gpu, f"{software} | CUDA {found['cuda']}", rates]


def settings_hash() -> str:
    """Of all settings files that ship: two runs with the same hash ran the same tiles."""
    digest = hashlib.sha256()
    for path in sorted(Path(samtrain_kernels.__path__[0]).glob("*/configs/*.json")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def setting_text(shape: Shape, device: torch.device, dtype: torch.dtype, *, trained: bool) -> str:
    """The tiles that our kernels use for a shape, as the table prints them."""
    from samtrain_kernels.settings import gpu_of, setting_for

    name, capability = gpu_of(device)
    texts = []
    kernels = (
        ("context_forward", "context_backward", "context_kv_grad")
        if trained
        else ("context_forward", "context_backward")
    )
    for kernel in kernels:
        s = setting_for(
            kernel,  # type: ignore[call-overload]
            dtype=dtype,
            head_dim=shape.head_dim,
            images=shape.most_images,
            device_name=name,
            capability=capability,
        )
        texts.append(f"IB{s.images_per_block} BP{s.block_patches} w{s.num_warps} s{s.num_stages}")
    return " / ".join(texts)


def _smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where it is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(_SMI_FIELDS, (value.strip() for value in line.split(","))))
