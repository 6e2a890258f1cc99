"""Work on the samples of a held-out split, shared out to all ranks in batches, its results brought together on each.

Whole batches are dealt in an order that depends on the set alone, so the same batches are formed for any number of
ranks.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from samtrain.core.distributed import all_gather_object, rank, world_size
from samtrain.core.errors import DataError, SamtrainError
from samtrain.core.events import Emit
from samtrain.data.index import ShardIndex

Result = TypeVar("Result")


def deal(
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Result]],
    *,
    what: str,
    emit: Emit,
) -> dict[int, Result]:
    """Sample -> its result, on every rank; to be called by all ranks.

    Args:
        work: the results of the samples of a batch, in order; each is picklable. Called for this rank's batches alone.
        what: the work in words, for `emit`, which hears {"kind": "progress", "what", "done", "total"}, in samples over
            all ranks.

    Raises:
        DataError: on all ranks, what `work` raised on one.
    """
    total, done = sum(len(batch) for batch in batches), 0
    results: dict[int, Result] = {}
    error: str | None = None
    emit({"kind": "progress", "what": what, "done": 0, "total": total})
    for start in range(0, len(batches), world_size()):
        mine = start + rank()
        if mine < len(batches) and error is None:
            try:
                results |= dict(zip(batches[mine], work(batches[mine]), strict=True))
            except SamtrainError as raised:
                error = str(raised)  # the other ranks wait for this one at the gathering: it raises after it
        done += sum(len(batch) for batch in batches[start : start + world_size()])
        emit({"kind": "progress", "what": what, "done": done, "total": total})
    merged: dict[int, Result] = {}
    for theirs, their_error in all_gather_object((results, error)):
        error = error or their_error
        merged |= theirs
    if error is not None:
        raise DataError(error)
    return merged


def cost_ordered_batches(index: ShardIndex, count: int, *, batch_size: int) -> list[list[int]]:
    """The first `count` samples in batches of similar cost, most images and longest text first."""

    def cost(i: int) -> tuple[int, int, int]:
        entry = index.entries[i]
        return (-entry.num_images, -entry.num_tokens_estimate, i)

    ordered = sorted(range(count), key=cost)
    return [ordered[start : start + batch_size] for start in range(0, count, batch_size)]
