"""Mask images keep the limits of overlap and visibility, and say truly where things are."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from samtrain.data.mmlink.compose import compose_grid, compose_scene
from samtrain.data.mmlink.options import ComposeOptions
from samtrain.data.mmlink.records import Rejected

OPTIONS = ComposeOptions(canvas=128)


Things = Callable[..., list[Image.Image]]


@pytest.fixture
def things(thing: Callable[..., Image.Image]) -> Things:
    return lambda *numbers: [thing(number, 0) for number in numbers]


def _overlap(one: list[int], other: list[int]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(0, width) * max(0, height) / min(areas)


def test_boxes_masks_and_limits_agree_in_every_layout(things: Things) -> None:
    for seed in range(40):
        drawn = compose_scene(things(1, 2, 3), [True] * 3, OPTIONS, np.random.default_rng(seed))
        mask, alpha = np.asarray(drawn.mask), np.asarray(drawn.things)[..., 3]
        assert drawn.mask.size == drawn.things.size == (128, 128)
        assert ((mask > 0) <= (alpha > 100)).all() and set(np.unique(mask)) == {0, 1, 2, 3}
        for row in drawn.objects:
            ys, xs = np.nonzero(mask == row["value"])
            assert row["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert row["visible"] >= OPTIONS.min_visible
            assert min(row["box"]) >= 0 and max(row["box"]) <= 128
        boxes = [row["box"] for row in drawn.objects]
        # Boxes of visible pixels lie inside the pasted ones, so the limit holds for them up to a pixel's rounding.
        assert all(_overlap(boxes[i], boxes[j]) <= 0.15 for i in range(3) for j in range(i))


def test_scale_and_position_vary_and_a_seed_repeats_them(things: Things) -> None:
    def boxes(seed: int) -> list[list[int]]:
        return [
            row["box"] for row in compose_scene(things(1, 2), [True] * 2, OPTIONS, np.random.default_rng(seed)).objects
        ]

    assert boxes(3) == boxes(3)
    found = [boxes(seed)[0] for seed in range(30)]
    sides = [max(box[2] - box[0], box[3] - box[1]) for box in found]
    assert max(sides) - min(sides) > 15 and len({tuple(box[:2]) for box in found}) > 25
    low, high = OPTIONS.scale
    assert min(sides) >= low * 128 * 0.7 and max(sides) <= high * 128 * 1.2


def test_small_pictures_are_not_blown_up(things: Things) -> None:
    options = ComposeOptions(canvas=128, max_enlargement=1.0, max_rotation=0)
    small = [image.resize((30, 30)) for image in things(1, 2)]
    for seed in range(10):
        drawn = compose_scene(small, [False] * 2, options, np.random.default_rng(seed))
        assert all(max(row["box"][2] - row["box"][0], row["box"][3] - row["box"][1]) <= 31 for row in drawn.objects)


def test_what_cannot_be_laid_out_is_rejected(things: Things) -> None:
    options = ComposeOptions(canvas=48, scale=(1.0, 1.0), distractor_scale=(1.0, 1.0), max_overlap=0.0, attempts=4)
    with pytest.raises(Rejected, match="no layout within the limits"):
        compose_scene(things(1, 2, 3, 4), [False] * 4, options, np.random.default_rng(0))


def test_a_grid_has_every_icon_in_its_own_cell(things: Things) -> None:
    drawn = compose_grid(things(*range(9)), 3, OPTIONS, np.random.default_rng(1))
    for number, row in enumerate(drawn.objects):
        assert (row["row"], row["column"]) == (number // 3 + 1, number % 3 + 1)
        x, y = (row["box"][0] + row["box"][2]) / 2, (row["box"][1] + row["box"][3]) / 2
        assert (int(3 * y / 128) + 1, int(3 * x / 128) + 1) == (row["row"], row["column"])
        assert row["visible"] == 1.0
