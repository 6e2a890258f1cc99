"""Reading and writing whole parameters, whether or not DeepSpeed ZeRO-3 has partitioned them.

model, generation and export take a `Gather` and never import deepspeed; the engine provides the real one.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn


class Gather(Protocol):
    """Makes the given parameters whole inside the context.

    With `modifier_rank=0` rank 0's writes are broadcast to all ranks on leaving; without it writes are lost.
    """

    def __call__(
        self, params: list[nn.Parameter], *, modifier_rank: int | None = None
    ) -> AbstractContextManager[object]: ...


def no_gather(params: list[nn.Parameter], *, modifier_rank: int | None = None) -> AbstractContextManager[object]:
    """The `Gather` of a process whose parameters are whole: every rank reads and writes its own copy."""
    return nullcontext()


def is_partitioned(param: nn.Parameter) -> bool:
    """True for a parameter that ZeRO-3 has split over the ranks (DeepSpeed marks it so)."""
    return hasattr(param, "ds_id")


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(param, "ds_shape", param.shape))


def num_elements(params: Iterable[nn.Parameter]) -> int:
    """Elements of the whole parameters, summed."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in params)
