"""A map over processes whose results come in order, so that what is built does not depend on how many there are."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from samtrain.core.errors import SamtrainError

Item = TypeVar("Item")
Result = TypeVar("Result")
_WORTH_A_POOL = 200  # fewer items are done before new processes have imported what they need


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    num_workers: int,
    initializer: Callable[..., None] | None = None,
    initargs: Iterable[Any] = (),
    chunksize: int = 16,
    worth_a_pool: int = _WORTH_A_POOL,
) -> Iterator[Result]:
    """`map(function, items)` over `num_workers` processes; in this one where a pool cannot help or is not allowed.

    Args:
        chunksize: items that travel to a process at once.
        worth_a_pool: fewer items than this are done in this process.

    Raises:
        SamtrainError: a process was killed, by the system for memory as a rule.
    """
    # Daemonic processes (workers of somebody's pool) may not have children.
    if num_workers <= 1 or len(items) < worth_a_pool or multiprocessing.current_process().daemon:
        if initializer is not None:
            initializer(*initargs)
        yield from map(function, items)
        return
    # spawn: the caller may hold threads and locks (torch, MLflow) that a fork would copy half-way.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=initializer, initargs=tuple(initargs)
    ) as pool:
        try:
            yield from pool.map(function, items, chunksize=chunksize)
        except BrokenProcessPool:
            raise SamtrainError(
                f"one of {num_workers} worker processes was killed, for lack of memory as a rule; use fewer"
            ) from None
