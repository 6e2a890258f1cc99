"""Where and with what a run was made."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks.data.corpus import Corpus
from samtrain.core.versions import git_commit

PACKAGES = (
    "torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "webdataset", "mosaicml-streaming", "litdata",
)  # fmt: skip


def header(corpus: Corpus, *, cores: list[int], peers: Path | None, **settings: Any) -> dict[str, Any]:
    """CPU, cores, load, versions, commit, date, the set and the settings."""
    return {
        "cpu": _cpu(),
        "cores": cores,
        "cores_of_machine": os.cpu_count(),
        "load_average_at_start": list(os.getloadavg()),
        "platform": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name, peers) for name in PACKAGES},
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "corpus": corpus.facts,
        "settings": settings,
    }


def headline(found: dict[str, Any]) -> list[str]:
    """The first lines of the text."""
    corpus, settings = found["corpus"], found["settings"]
    versions = " ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = found["load_average_at_start"][0]
    return [
        f"{found['cpu']}, {len(found['cores'])} of {found['cores_of_machine']} cores for each row | "
        f"load before the run {load:.1f} | {found['date']} | commit {found['commit'][:12]}",
        f"python {found['python']} {versions}",
        f"{corpus['num_samples']} samples, {corpus['num_images']} JPEGs of {corpus['megapixels_per_image']:.2f} "
        f"megapixels on average, {corpus['bits_per_pixel']:.1f} bits a pixel (quality {corpus['quality']}); content: "
        f"{corpus['content']}",
        f"to 224 px float32 tensors: RandomResizedCrop (0.5-1), flip, normalised; batches of {settings['batch_size']} "
        f"samples; page cache warm; {settings['rounds']} rounds, rows in turns",
    ]


def _cpu() -> str:
    """The model's class; virtual machines often hide more."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    best = next((name for name in ("avx512f", "avx2", "sse4_2") if name in flags), "")
    return f"{model} ({best})" if best else model


def _version(name: str, peers: Path | None) -> str:
    places = importlib.metadata.distributions(name=name, path=[str(peers)]) if peers else ()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return next((found.version for found in places), "absent")
