"""One micro-batch of ZeRO-3 as events: a stream that computes, and a stream that communicates in order.

A bucket is a run of parameters that are gathered together. Its gather may begin when the communication stream is free
and what was gathered and not yet used leaves room (`max_live_elements`); its compute begins when the stream is free and
its gather has ended. In the backward pass gradients of a bucket are reduce-scattered after its compute. All ranks take
part in every collective, so they go in step: each piece of compute lasts as long as on the slowest rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """gathered, gathered_again: elements for the forward and the backward pass; reduced: of gradients.

    forward, backward: seconds of compute.
    """

    gathered: int
    gathered_again: int
    reduced: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Timeline:
    """Seconds. compute: of the other stream; busy: of the communication stream."""

    total: float
    compute: float
    busy: float

    @property
    def exposed(self) -> float:
        return self.total - self.compute


Seconds = Callable[[int], float]  # elements -> seconds of the collective


def simulate(
    buckets: Sequence[Bucket], *, gather: Seconds, gather_again: Seconds, reduce: Seconds, max_live_elements: float
) -> Timeline:
    """Forward and backward pass of one micro-batch."""
    clock = _Clock()
    _sweep(clock, [(b.gathered, b.forward, 0) for b in buckets], gather, reduce, max_live_elements)
    clock.meet()  # nothing of the backward pass is gathered before it begins
    backward = [(b.gathered_again, b.backward, b.reduced) for b in reversed(buckets)]
    _sweep(clock, backward, gather_again, reduce, max_live_elements)
    total = max(clock.compute, clock.communication)
    return Timeline(total, sum(b.forward + b.backward for b in buckets), clock.busy)


class _Clock:
    def __init__(self) -> None:
        self.compute = self.communication = self.busy = 0.0

    def communicate(self, seconds: float, *, not_before: float) -> float:
        """Returns when it ends."""
        if seconds == 0.0:
            return not_before
        self.communication = max(self.communication, not_before) + seconds
        self.busy += seconds
        return self.communication

    def meet(self) -> None:
        self.compute = max(self.compute, self.communication)


def _sweep(
    clock: _Clock, work: Sequence[tuple[int, float, int]], gather: Seconds, reduce: Seconds, max_live_elements: float
) -> None:
    """One pass over the buckets in order: (elements to gather, seconds to compute, elements to reduce)."""
    ended: list[float] = []  # compute of each bucket
    live, oldest = 0, 0  # gathered and not yet released; the first bucket among them
    begin = clock.compute
    waiting: list[tuple[float, int]] = []  # reductions: (when ready, elements)
    issued: list[float] = []  # when the gather of each bucket has ended
    for i in range(len(work)):
        # As far ahead as memory allows; a bucket always fits alone.
        while len(issued) < len(work):
            j = len(issued)
            elements = work[j][0]
            while live + elements > max_live_elements and oldest < min(len(ended), j):
                live -= work[oldest][0]
                begin = max(begin, ended[oldest])
                oldest += 1
            if live + elements > max_live_elements and j > i:
                break
            start = begin
            # Reductions that are ready before it go first: one stream, in order of issue.
            while waiting and waiting[0][0] <= max(start, clock.communication):
                ready, reduced = waiting.pop(0)
                clock.communicate(reduce(reduced), not_before=ready)
            issued.append(clock.communicate(gather(elements), not_before=start) if elements else start)
            live += elements
        clock.compute = max(clock.compute, issued[i]) + work[i][1]
        ended.append(clock.compute)
        if work[i][2]:
            waiting.append((clock.compute, work[i][2]))
    for ready, reduced in waiting:
        clock.communicate(reduce(reduced), not_before=ready)
