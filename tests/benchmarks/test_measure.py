"""The measuring loop by a counter in the clock's place; no time is ever taken here."""

from typing import Any

import pytest
import torch

from benchmarks.kernels import measure
from benchmarks.kernels.cases import Case, make_inputs
from benchmarks.kernels.measure import (
    NoGpuError,
    Row,
    Timing,
    measure_rows,
    number_of_sets,
    quantile,
    repetitions,
    sample,
)
from benchmarks.kernels.registry import IMPLEMENTATIONS
from benchmarks.kernels.shapes import SHAPES, reduced


class Counter:
    """Every mark is one later than the one before."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def milliseconds(self, start: int, end: int) -> float:
        return float(end - start)


def a_row(seen: list[int], *, sets: int = 3, sliced: bool = False) -> Row:
    implementation = IMPLEMENTATIONS["sdpa"]
    case = Case("op", reduced(SHAPES["D"]), "others", True)
    given = [
        make_inputs(
            case, implementation, device=torch.device("cpu"), dtype=torch.float32, backend="reference", seed=seed
        )
        for seed in range(sets)
    ]
    run = implementation.build("op")

    def watched(inputs: Any) -> tuple[torch.Tensor, ...]:
        seen.append(next(i for i, x in enumerate(given) if x is inputs))
        return run(inputs)

    return Row(watched, given, sliced=sliced)


def test_input_sets_rotate_and_no_gradient_is_left_behind() -> None:
    seen: list[int] = []
    row = a_row(seen)
    seen.clear()
    sample(row, "both", reps=5, timer=Counter())
    assert seen == [0, 1, 2, 0, 1]
    assert all(leaf.grad is None for leaves in row.leaves for leaf in leaves)
    assert all(leaves for leaves in row.leaves)


def test_backward_is_timed_without_its_forward() -> None:
    """Two marks around each backward pass, one before all: five calls of one tick each."""
    timer = Counter()
    assert sample(a_row([]), "backward", reps=5, timer=timer) == 1.0
    assert timer.marks == 1 + 2 * 5


def test_a_flush_stays_outside_the_time() -> None:
    flushed: list[int] = []
    timer = Counter()
    for which in measure.PASSES:
        assert sample(a_row([]), which, reps=4, timer=timer, before=lambda: flushed.append(timer.mark())) == 1.0
    assert len(flushed) == 12


def test_rows_take_turns_in_every_sample() -> None:
    order: list[str] = []
    rows = {}
    for name in ("a", "b"):
        row = a_row([])
        forward = row.forward
        row.forward = lambda i, name=name, forward=forward: (order.append(name), forward(i))[1]  # type: ignore[method-assign]
        rows[name] = row
    result = measure_rows(rows, passes=("forward",), samples=3, reps=1, timer=Counter())
    assert order[4:] == ["a", "b"] * 3, "after two calls of each that choose the repetitions"
    assert result["a"]["forward"].samples == 3


def test_percentiles() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    timing = Timing.of([5.0, 1.0, 3.0, 2.0, 4.0], reps=7)
    assert (timing.p20, timing.median, timing.p80, timing.reps) == (1.8, 3.0, 4.2, 7)


def test_slow_rows_repeat_less_and_sets_outgrow_the_cache() -> None:
    assert repetitions(0.05, 20) == 20 and repetitions(100.0, 20) == 2 and repetitions(9000.0, 20) == 1
    l2 = 50 * 2**20
    for set_bytes in (2**20, 60 * 2**20, 2**30):
        number = number_of_sets(set_bytes, l2)
        assert number >= 4 and number * set_bytes > 4 * l2


def test_strided_gradients_give_the_same_gradients() -> None:
    results = []
    for sliced in (False, True):
        row = a_row([], sliced=sliced)
        results.append(torch.autograd.grad(row.forward(0), row.leaves[0], row.gradients, allow_unused=True))
    assert all(torch.allclose(a, b) for a, b in zip(*results) if a is not None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_time_is_taken_without_a_gpu() -> None:
    row = a_row([])
    for refuses in (
        measure.EventTimer,
        lambda: measure_rows({"row": row}),
        lambda: measure.wall_milliseconds(row),
        lambda: measure.graph_milliseconds(row, "both"),
        lambda: measure.warm_up(row),
        lambda: measure.peak_bytes(row),
        lambda: measure.kernels_launched(row),
        lambda: measure.device_rates(torch.device("cpu")),
        lambda: measure.flush(torch.device("cpu")),
    ):
        with pytest.raises(NoGpuError, match="a CPU's are not a kernel's speed"):
            refuses()


def test_profiled_kernels_are_recognised_by_a_device_type_that_exists() -> None:
    assert torch.autograd.DeviceType.CUDA is not None
