"""Fragments written by one number of ranks and read by another, without processes."""

import pytest
import torch

from samtrain.core.errors import CheckpointError
from samtrain.engine.fragments import KINDS, named_tensors, read_fragments, write_tensors
from samtrain.engine.zero import Fragment, owned_range

SHAPES = {"one": (1,), "odd": (7, 3), "even": (4, 6), "single.row": (5,)}


def fragments(values: dict[str, dict[str, torch.Tensor]], *, rank: int, world_size: int) -> list[Fragment]:
    found = []
    for name, shape in SHAPES.items():
        start, stop = owned_range(values[name]["master"].numel(), rank=rank, world_size=world_size)
        parts = {kind: values[name][kind].flatten()[start:stop].clone() for kind in KINDS}
        found.append(Fragment(name, shape, start, stop, **parts))
    return found


def some(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return {name: {kind: torch.randn(shape, generator=random) for kind in KINDS} for name, shape in SHAPES.items()}


@pytest.mark.parametrize("numel", [0, 1, 2, 7, 24])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_own_every_element_once(numel, world_size):
    ranges = [owned_range(numel, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(numel))


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 1), (1, 2), (2, 3), (8, 3), (3, 8)])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, writers, readers):
    written = some(1)
    for rank in range(writers):
        write_tensors(tmp_path, dict(named_tensors(fragments(written, rank=rank, world_size=writers))), rank=rank)
    for rank in range(readers):
        mine = fragments(some(2), rank=rank, world_size=readers)
        read_fragments(tmp_path, mine, saved_world_size=writers)
        for found, expected in zip(mine, fragments(written, rank=rank, world_size=readers)):
            for kind in KINDS:
                assert torch.equal(getattr(found, kind), getattr(expected, kind))


def test_missing_file_is_named(tmp_path):
    write_tensors(tmp_path, dict(named_tensors(fragments(some(1), rank=0, world_size=2))), rank=0)
    with pytest.raises(CheckpointError, match=r"fragments-00001\.safetensors"):
        read_fragments(tmp_path, fragments(some(2), rank=0, world_size=1), saved_world_size=2)
