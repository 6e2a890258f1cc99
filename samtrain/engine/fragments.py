"""The files of a checkpoint's tensors: each rank's fragments, readable by any number of ranks.

Rank r of W writes `fragments-<r>.safetensors`; for every trainable parameter `name` of n elements it holds
`name/master`, `name/exp_avg` and `name/exp_avg_sq`, elements [r * ceil(n / W), min(n, (r + 1) * ceil(n / W))) of the
flat parameter in float32. The manifest holds names, shapes and W, from which every rank of another W knows where to
read its own elements. Files are safetensors: no pickle, and slices are read without the rest.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from samtrain.core.errors import CheckpointError
from samtrain.engine.zero import Fragment, owned_range

KINDS = ("master", "exp_avg", "exp_avg_sq")


def fragments_file(rank: int) -> str:
    return f"fragments-{rank:05d}.safetensors"


def named_tensors(fragments: Iterable[Fragment]) -> Iterator[tuple[str, Tensor]]:
    """What a file holds of these fragments, under its names there; nothing of those without elements."""
    for fragment in fragments:
        if fragment.stop > fragment.start:
            for kind in KINDS:
                yield f"{fragment.name}/{kind}", getattr(fragment, kind)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, rank: int) -> None:
    """Write this rank's file from `named_tensors` on the host, and force it to disk."""
    path = folder / fragments_file(rank)
    save_file(dict(tensors), path)  # without Python's lock: other threads go on
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def read_fragments(folder: Path, fragments: Iterable[Fragment], *, saved_world_size: int) -> None:
    """Fill this rank's fragments from the files of `saved_world_size` ranks.

    Raises:
        CheckpointError: a file is missing or damaged, naming it.
    """
    files: dict[int, Any] = {}
    for fragment in fragments:
        numel = math.prod(fragment.shape)
        for source in range(saved_world_size):
            start, stop = owned_range(numel, rank=source, world_size=saved_world_size)
            low, high = max(start, fragment.start), min(stop, fragment.stop)
            if low >= high:
                continue
            if source not in files:
                files[source] = _open(folder / fragments_file(source))
            for kind in KINDS:
                values = _slice(files[source], f"{fragment.name}/{kind}", low - start, high - start, folder=folder)
                target: Tensor = getattr(fragment, kind)
                target[low - fragment.start : high - fragment.start].copy_(values)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from another checkpoint") from None


def _slice(file: Any, name: str, start: int, stop: int, *, folder: Path) -> Tensor:
    try:
        values = file.get_slice(name)[start:stop]
    except Exception as error:
        raise CheckpointError(f"{folder}: `{name}` cannot be read ({error}); resume from another checkpoint") from None
    if len(values) != stop - start or values.dtype != torch.float32:
        raise CheckpointError(f"{folder}: `{name}` is shorter than the manifest says; resume from another checkpoint")
    return values


def check_manifest(manifest: dict[str, Any], expected: dict[str, list[int]], *, folder: Path) -> None:
    """The checkpoint's trainable parameters are the model's, no more, no less, in the same shapes.

    Raises:
        CheckpointError: naming up to five of each kind of gap.
    """
    saved: dict[str, list[int]] = manifest["trainable"]
    shapes = [
        f"{name} {saved[name]} in the checkpoint, {expected[name]} in the model"
        for name in expected
        if name in saved and saved[name] != expected[name]
    ]
    gaps = {
        "the model trains but the checkpoint lacks": [name for name in expected if name not in saved],
        "the checkpoint holds but the model does not train": [name for name in saved if name not in expected],
        "with another shape": shapes,
    }
    lines = [f"{len(names)} parameters {what}: {_some(names)}" for what, names in gaps.items() if names]
    if lines:
        raise CheckpointError(
            f"{folder} does not fit the model:\n  " + "\n  ".join(lines) + "\nUse the recipe it was trained with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
