"""Times on a GPU, and nowhere else.

Every sample of a table takes all rows in turn, so that a drifting clock moves them alike. Input sets rotate through
more than four times the L2 cache, so that a row finds nothing of its own last visit there. A row's time is the median
of its samples.

    forward    with autograd recording, as in training
    backward   of that graph alone; between events of its own, the forward pass outside
    both       one after the other
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.kernels.cases import Inputs, needing_gradients, output_gradients
from benchmarks.kernels.floors import Rates
from benchmarks.kernels.registry import Run

Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")

SAMPLES = 30
REPS = 20
SLOW_SECONDS = 0.25  # a sample of a slow row holds fewer repetitions, so that a table ends
L2_MULTIPLE = 4


class NoGpuError(RuntimeError):
    """A time was asked for on a machine without a GPU."""


def require_gpu() -> None:
    """Raises NoGpuError: the time of a CPU says nothing about a GPU kernel, so none is ever taken."""
    if not torch.cuda.is_available():
        raise NoGpuError("no CUDA device: times are measured on a GPU alone; a CPU's are not a kernel's speed")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and 20th and 80th percentile over samples."""

    median: float
    p20: float
    p80: float
    samples: int
    reps: int

    @staticmethod
    def of(milliseconds: Sequence[float], *, reps: int) -> "Timing":
        ordered = sorted(milliseconds)
        return Timing(quantile(ordered, 0.5), quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered), reps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between neighbours, of ascending values."""
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Row:
    """An implementation on its rotating input sets.

    Args:
        sets: inputs of equal shape and different values. sliced: gradients of the outputs are views of wider tensors.

    Without an output that needs a gradient a row has no backward pass: `has_backward` is False, and forward is timed.
    """

    def __init__(self, run: Run, sets: Sequence[Inputs], *, sliced: bool = False) -> None:
        self.run, self.sets = run, list(sets)
        self.leaves = [given.leaves() for given in self.sets]
        self.visits = 0
        outputs = needing_gradients(run(self.sets[0]))
        self.gradients = output_gradients(outputs, sliced=sliced)
        self.has_backward = bool(outputs)

    def next(self) -> int:
        self.visits += 1
        return (self.visits - 1) % len(self.sets)

    def forward(self, which: int) -> tuple[Tensor, ...]:
        return needing_gradients(self.run(self.sets[which]))

    def backward(self, outputs: tuple[Tensor, ...], which: int) -> None:
        if self.has_backward:
            torch.autograd.backward(outputs, self.gradients)
        for leaf in self.leaves[which]:
            leaf.grad = None


class EventTimer:
    """Time between two CUDA events; a test puts a counter in its place."""

    def __init__(self) -> None:
        require_gpu()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Waits for `end`."""
        end.synchronize()
        return start.elapsed_time(end)


def sample(row: Row, which: Pass, *, reps: int, timer: Any, before: Callable[[], object] | None = None) -> float:
    """Milliseconds of one call, from `reps` calls. `before` runs ahead of every call, outside the time (L2 flush)."""
    pairs = []
    start = timer.mark()
    for _ in range(reps):
        i = row.next()
        if which == "backward":
            outputs = row.forward(i)
            if before is not None:
                before()
            begin = timer.mark()
            row.backward(outputs, i)
            pairs.append((begin, timer.mark()))
            continue
        if before is not None:
            before()
            start = timer.mark()
        outputs = row.forward(i)
        if which == "both":
            row.backward(outputs, i)
        del outputs
        if before is not None:
            pairs.append((start, timer.mark()))
    if not pairs:
        pairs = [(start, timer.mark())]
    return sum(timer.milliseconds(begin, end) for begin, end in pairs) / reps


def measure_rows(
    rows: dict[str, Row],
    *,
    passes: Sequence[Pass] = PASSES,
    samples: int = SAMPLES,
    reps: int = REPS,
    timer: Any = None,
    before: Callable[[], object] | None = None,
) -> dict[str, dict[Pass, Timing]]:
    """Round-robin over rows and passes, `samples` times."""
    timer = timer or EventTimer()
    chosen = {
        (name, which): repetitions(sample(row, which, reps=2, timer=timer, before=before), reps)
        for name, row in rows.items()
        for which in passes
        if which == "forward" or row.has_backward
    }
    seen: dict[tuple[str, Pass], list[float]] = {key: [] for key in chosen}
    for _ in range(samples):
        for (name, which), n in chosen.items():
            seen[name, which].append(sample(rows[name], which, reps=n, timer=timer, before=before))
    timings: dict[str, dict[Pass, Timing]] = {name: {} for name in rows}
    for (name, which), times in seen.items():
        timings[name][which] = Timing.of(times, reps=chosen[name, which])
    return timings


def repetitions(milliseconds: float, most: int) -> int:
    """How often a row runs in a sample: `most` times, fewer where that would take too long."""
    return max(1, min(most, int(SLOW_SECONDS * 1000 / max(milliseconds, 1e-6))))


def number_of_sets(set_bytes: int, l2_bytes: int) -> int:
    """At least 4, together more than four times the L2 cache."""
    return max(4, L2_MULTIPLE * l2_bytes // max(set_bytes, 1) + 1)


def flush(device: torch.device) -> Callable[[], object]:
    """Overwrites the L2 cache."""
    require_gpu()
    size = L2_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size, dtype=torch.int8, device=device)
    return buffer.zero_


def graph_milliseconds(row: Row, which: Literal["forward", "both"], *, reps: int = REPS) -> float:
    """The same work from a CUDA graph that holds one call for every input set: no host in it.

    Raises:
        RuntimeError: the work cannot be captured.
    """
    timer = EventTimer()

    def work() -> None:
        for i in range(len(row.sets)):
            outputs = row.forward(i)
            if which == "both":
                torch.autograd.grad(outputs, row.leaves[i], row.gradients, allow_unused=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(10):
        start = timer.mark()
        for _ in range(max(1, reps // len(row.sets))):
            graph.replay()
        calls = len(row.sets) * max(1, reps // len(row.sets))
        times.append(timer.milliseconds(start, timer.mark()) / calls)
    return quantile(sorted(times), 0.5)


def wall_milliseconds(row: Row, *, reps: int = 5) -> float:
    """Forward and backward including the host: what a loop over images really costs."""
    require_gpu()
    torch.cuda.synchronize()
    since = time.perf_counter()
    for _ in range(reps):
        i = row.next()
        row.backward(row.forward(i), i)
    torch.cuda.synchronize()
    return (time.perf_counter() - since) * 1000 / reps


def peak_bytes(row: Row) -> int:
    """Largest memory of one forward and backward pass beyond what was there before (inputs, other rows)."""
    require_gpu()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row.backward(row.forward(0), 0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels_launched(row: Row) -> tuple[int, int]:
    """CUDA kernels of one forward and one backward pass, from the profiler."""
    require_gpu()
    from torch.profiler import ProfilerActivity, profile

    counts = []
    outputs: tuple[Tensor, ...] = ()

    def forward() -> None:
        nonlocal outputs
        outputs = row.forward(0)

    for work in (forward, lambda: row.backward(outputs, 0)):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(len([e for e in kernels if not e.name.startswith(("Memcpy", "Memset"))]))
    return counts[0], counts[1]


def warm_up(row: Row) -> float:
    """Seconds until a row has run twice, forward and backward: compilation, settings, handles."""
    require_gpu()
    torch.cuda.synchronize()
    since = time.perf_counter()
    for which in (0, min(1, len(row.sets) - 1)):
        row.backward(row.forward(which), which)
    torch.cuda.synchronize()
    return time.perf_counter() - since


def device_rates(device: torch.device) -> Rates:
    """Copy bandwidth (read plus write) and bfloat16 matmul rate of this device, now."""
    timer = EventTimer()
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul = _best(lambda: a @ b, timer)
    source = torch.randn(2**29, device=device, dtype=torch.bfloat16)  # 1 GiB
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), timer)
    return Rates(flops=2.0 * size**3 / (matmul / 1e3), bytes=2.0 * 2**30 / (copy / 1e3))


def _best(work: Callable[[], object], timer: Any) -> float:
    """Median milliseconds after a warm-up."""
    for _ in range(5):
        work()
    times = []
    for _ in range(20):
        start = timer.mark()
        work()
        times.append(timer.milliseconds(start, timer.mark()))
    return quantile(sorted(times), 0.5)


def release() -> None:
    """Give cached memory back and forget compiled code: tables must not see each other."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
