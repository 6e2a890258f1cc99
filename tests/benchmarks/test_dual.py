"""Both streams in one launch: the W stream as context attention computes it, the Q stream as SDPA does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from samtrain_kernels.context_attention.reference import AttentionInputs, context_attention_reference
from samtrain_kernels.settings import KernelSetting
from samtrain_kernels.testing import assert_accurate
from torch import Tensor

from benchmarks.kernels import floors, measure, run
from benchmarks.kernels.cases import Case, make_inputs
from benchmarks.kernels.gate import Gate
from benchmarks.kernels.implementations import sdpa
from benchmarks.kernels.registry import IMPLEMENTATIONS, rows_of
from benchmarks.kernels.shapes import SHAPES, reduced
from samtrain.core.batch import ImageGroups

dual: Any = pytest.importorskip("benchmarks.kernels.dual")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both_streams(counts: list[int], patches: int, images_per_block: int) -> list[dict[str, Tensor]]:
    """W, its lse, Q and its lse: from the kernel, from PyTorch in float32, and in float64. Values and queries of both
    streams are views of wider tensors."""
    generator = torch.Generator().manual_seed(len(counts) + patches)
    images, heads, queries, width = sum(counts), 2, 5, 16
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    key, value = normal(images, patches, 2, heads, width).unbind(2)
    query, context_query = normal(images, 2 * queries, heads, width).split(queries, 1)
    weights = normal(images, max(counts), patches).softmax(1)
    setting = KernelSetting(images_per_block, 16, 4, 2)
    names = ("W", "W lse", "Q", "Q lse")
    results = [dict(zip(names, dual.dual_forward(query, context_query, key, value, weights, groups, setting=setting)))]
    for dtype in (torch.float32, torch.float64):
        q, w, k, v, a = (x.to(dtype) for x in (query, context_query, key, value, weights))
        x = AttentionInputs(w, k, v, a, None, None, groups, "others", "image", width**-0.5)
        scores = torch.einsum("rqhd,rphd->rhqp", q, k) * width**-0.5
        lse = torch.logsumexp(scores, -1) / torch.log(torch.tensor(2.0, dtype=dtype))
        results.append(dict(zip(names, (*context_attention_reference(x), sdpa(q, k, v), lse))))
    return results


@pytest.mark.parametrize(
    ("images_per_block", "patches", "counts"),
    [(1, 21, [1, 2]), (2, 37, [3, 1, 2]), (2, 16, [1, 2]), (4, 21, [5, 1])],
)
def test_both_streams_agree_with_float64(images_per_block: int, patches: int, counts: list[int]) -> None:
    """Samples of one image, of full blocks and of a block and a part; patches with a ragged tile and without."""
    got, eager, exact = both_streams(counts, patches, images_per_block)
    alone = sum(counts[: counts.index(1)])
    assert not got["W"][alone].any()  # nobody else in the sample
    for row in (got, eager, exact):
        row["W"] = torch.cat([row["W"][:alone], row["W"][alone + 1 :]])
    assert_accurate(got, eager, exact, dtype=torch.float32, kinds=dict.fromkeys(exact, "output"))


def test_the_row_passes_the_benchmarks_gate() -> None:
    case = Case("cross", replace(reduced(SHAPES["E"]), counts=(2, 3)), "others", False)
    gate = Gate(case, device=torch.device(DEVICE), dtype=torch.float32, backend="triton")
    row = IMPLEMENTATIONS["dual"]
    verdict = gate.judge(row, row.build("cross"), full=False, backward=False)
    assert verdict.is_ok and len(verdict.errors) == 2, verdict.why


def test_the_row_is_measured_where_it_applies_and_forward_alone() -> None:
    assert "dual" in rows_of("cross", context="others") and "dual" not in rows_of("cross", context="all")
    key = ("cross", "others", False, "found", "dual")
    verdicts = run.check_on_cpu([key[:4]], run.Selection(only=("dual",)), lambda _: None)  # type: ignore[list-item]
    assert verdicts == {key: {"match": "-", "why": "forward alone: needs a GPU"}}

    case = Case("cross", replace(reduced(SHAPES["D"]), heads=1), "others", True)
    given = make_inputs(
        case, IMPLEMENTATIONS["sdpa"], device=torch.device("cpu"), dtype=torch.float32, backend="reference"
    )
    sdpa_row = IMPLEMENTATIONS["sdpa"].build("cross")
    rows = {
        "forward alone": measure.Row(lambda x: tuple(y.detach() for y in sdpa_row(x)), [given]),
        "trains": measure.Row(sdpa_row, [given]),
    }
    timed = measure.measure_rows(rows, samples=1, reps=1, timer=Ticks())
    assert {name: tuple(of_row) for name, of_row in timed.items()} == {
        "forward alone": ("forward",),
        "trains": measure.PASSES,
    }


class Ticks:
    """In the clock's place."""

    def mark(self) -> int:
        return 0

    def milliseconds(self, start: int, end: int) -> float:
        return 1.0


def test_counts_of_the_headline_shape() -> None:
    """Keys and values read once instead of twice: 63 MB. A block of one shares nothing."""
    least = dual.least_work(SHAPES["A"])
    assert round(least["two launches"]["bytes"] / 1e6) == 263 and round(least["one launch"]["bytes"] / 1e6) == 200
    assert least["two launches"]["flops"] == least["one launch"]["flops"]
    assert len({tuple(way.values()) for way in dual.attention_work(SHAPES["A"], 1).values()}) == 1
    two, one = dual.attention_work(SHAPES["A"], 2).values()
    assert two["loaded_bytes"] - one["loaded_bytes"] == floors.key_value_bytes(SHAPES["A"], 80)
