"""Distributed helpers that are harmless in a single process."""

from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's picklable value, by rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_on_hosts(value: Any) -> list[Any]:
    """`all_gather_object` between the hosts alone: no device waits, or is waited for. All ranks call it in turn."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_host_group())
    return gathered


def all_gather_int_on_hosts(value: int) -> list[int]:
    """The same for one integer below 2^63: a third of the time."""
    if not is_distributed():
        return [value]
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(gathered, torch.tensor([value]), group=_host_group())
    return [int(one) for one in gathered]


_host_groups: dict[Any, Any] = {}  # default group -> a gloo group over the same ranks


def _host_group() -> Any:
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _host_groups:
        _host_groups.clear()  # of a default group that was destroyed
        _host_groups[world] = dist.new_group(backend="gloo")
    return _host_groups[world]


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
