"""The shapes are those of the protocol."""

import random

from benchmarks.kernels.shapes import RAGGED_COUNTS, SHAPES, SWEEP, reduced, sweep


def test_the_ragged_counts_are_a_seeded_draw_with_as_many_images_as_the_headline_shape() -> None:
    drawn = random.Random(13)
    assert tuple(drawn.randint(2, 10) for _ in range(16)) == RAGGED_COUNTS
    assert abs(SHAPES["E"].images / SHAPES["A"].images - 1) <= 0.1


def test_all_seven_shapes_are_there() -> None:
    assert [(s.groups, s.most_images, s.patches) for s in SHAPES.values()] == [
        (16, 5, 257), (16, 2, 257), (8, 10, 257), (1, 2, 257), (16, 10, 257), (64, 5, 257), (16, 5, 577),
    ]  # fmt: skip


def test_a_reduced_shape_keeps_what_decides_the_path() -> None:
    small = reduced(SHAPES["E"])
    assert len(set(small.counts)) > 1 and small.layers >= small.contextual_layer >= small.initial_layer
    assert len(set(reduced(SHAPES["A"]).counts)) == 1
    assert reduced(SHAPES["D"]).groups == 1


def test_the_sweep_differs_in_images_alone() -> None:
    assert [shape.most_images for shape in sweep()] == list(SWEEP)
    assert {shape.groups for shape in sweep()} == {16}
