"""Counts on fake tensors: exact where they can be worked out by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import floors
from benchmarks.kernels.cases import Case, make_inputs
from benchmarks.kernels.counts import attention_of, count, count_run
from benchmarks.kernels.registry import IMPLEMENTATIONS
from benchmarks.kernels.run import count_row
from benchmarks.kernels.shapes import SHAPES, reduced

A = SHAPES["A"]
SMALL = reduced(A)


def test_the_materialised_row_does_the_arithmetic_of_its_floor() -> None:
    got = count(Case("cross", A, "others", True), IMPLEMENTATIONS["sdpa"])
    forward = floors.cross(A, "others", "materialised", trained=True, direction="forward")
    backward = floors.cross(A, "others", "materialised", trained=True, direction="backward")
    assert got.flops_forward == pytest.approx(forward.flops, rel=1e-9)
    assert got.flops_backward == pytest.approx(backward.flops, rel=1e-9)


def test_ours_has_no_second_projection_and_keeps_no_contextual_keys() -> None:
    case = Case("cross", A, "others", False)
    ours, library = (count(case, IMPLEMENTATIONS[name]) for name in ("ours", "sdpa"))
    least = floors.cross(A, "others", "fused", trained=False, direction="forward")
    assert ours.flops_forward == pytest.approx(least.flops, rel=1e-9)
    frozen = floors.cross(A, "others", "fused", trained=False, direction="backward")
    assert ours.flops_backward == pytest.approx(frozen.flops, rel=1e-9)
    # The images' keys and values, once, and outputs; the library keeps those of the contexts.
    assert ours.saved < 1.2 * floors.key_value_bytes(A, A.images)
    assert library.flops_forward / ours.flops_forward > 1.9


def test_fake_counts_equal_real_ones() -> None:
    case = Case("cross", SMALL, "all", True)
    for name in ("eager", "mixed", "loop"):
        implementation = IMPLEMENTATIONS[name]
        given = make_inputs(case, implementation, device=torch.device("cpu"), dtype=torch.bfloat16, backend="reference")
        real = count_run(implementation.build("cross"), given)
        fake = count(case, implementation)
        assert (fake.launches_forward, fake.launches_backward) == (real.launches_forward, real.launches_backward), name
        assert fake.flops_forward == real.flops_forward, name
        assert fake.saved == pytest.approx(real.saved, rel=1e-3), name  # index tables are inputs only when real


def test_a_loop_launches_more_with_every_image_and_a_batch_does_not() -> None:
    per_images = [replace(SMALL, counts=(n,) * 2) for n in (2, 4)]
    loop, batched = (
        [count(Case("cross", shape, "others", False), IMPLEMENTATIONS[name]).launches_forward for shape in per_images]
        for name in ("loop", "sdpa")
    )
    assert loop[1] > 1.8 * loop[0] and batched[0] == batched[1]


def test_the_count_of_a_long_loop_follows_exactly_from_two_short_ones() -> None:
    case = Case("qformer", replace(SMALL, counts=(4, 4), layers=2, initial_layer=2, contextual_layer=2), "all", False)
    assert count_row(case, "loop") == count(case, IMPLEMENTATIONS["loop"]).to_dict()


def test_saved_memory_leaves_out_what_was_given() -> None:
    case = Case("op", A, "all", False)
    got = count(case, IMPLEMENTATIONS["ours"])
    assert got.saved < floors.key_value_bytes(A, A.images) / 10, "keys and values are inputs of this level"


def test_the_attention_that_ran_is_named() -> None:
    assert count(Case("op", SMALL, "all", False), IMPLEMENTATIONS["sdpa"]).attention == (
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    assert attention_of({"aten::mm": 3, "aten::_scaled_dot_product_cudnn_attention": 1}) == (
        "_scaled_dot_product_cudnn_attention",
    )
