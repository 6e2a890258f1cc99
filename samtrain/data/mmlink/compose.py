"""Mask images: cut-out things at random scale and position on an empty canvas, and which pixel belongs to which.

S: side of the canvas in pixels. Boxes are [left, top, right, bottom), the last two exclusive, around visible pixels.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from samtrain.data.mmlink.options import ComposeOptions
from samtrain.data.mmlink.records import Rejected

_PALETTE = [0, 0, 0, 230, 60, 60, 60, 160, 230, 240, 190, 40, 80, 190, 90, 170, 90, 200, 240, 140, 60]
_EDGE = 3  # pixels that stay free at the canvas's edge
_SHRINK_EVERY, _SHRINK = 6, 0.93
_TRIES = 10  # positions of one thing beside those that lie already
_MIN_SIDE = 24

Corner = tuple[int, int]


@dataclass(frozen=True)
class MaskImage:
    """things: [S, S] RGBA, transparent where the background will be. mask: [S, S] P, i + 1 where thing i is visible.

    objects: a row per thing, in the order given (A first): box, visible (part of it that is not covered), value.
    """

    things: Image.Image
    mask: Image.Image
    objects: list[dict[str, Any]]


def compose_scene(
    cutouts: list[Image.Image], mirrors: list[bool], options: ComposeOptions, rng: np.random.Generator
) -> MaskImage:
    """A and its neighbours on one canvas.

    Args:
        cutouts: RGBA; the first is A.
        mirrors: which may be mirrored.

    Raises:
        Rejected: no layout keeps the limits of overlap and visibility in `options.attempts` tries.
    """
    for attempt in range(options.attempts):
        shrink = _SHRINK ** (attempt // _SHRINK_EVERY)
        sprites = [
            _sized(image, mirror, i == 0, shrink, options, rng)
            for i, (image, mirror) in enumerate(zip(cutouts, mirrors))
        ]
        corners = _corners(sprites, options, rng)
        if corners is None:
            continue
        drawn = _draw(sprites, corners, options.canvas, rng.permutation(len(sprites)))
        if all(row["visible"] >= options.min_visible for row in drawn.objects):
            return drawn
    raise Rejected(f"no layout within the limits of overlap and visibility in {options.attempts} attempts")


def compose_grid(icons: list[Image.Image], side: int, options: ComposeOptions, rng: np.random.Generator) -> MaskImage:
    """Icons in cells of a side x side grid, in the order given, each a little off its middle."""
    cell = options.canvas / side
    sprites, corners = [], []
    for number, icon in enumerate(icons):
        longest = cell * rng.uniform(0.6, 0.78)
        sprite = _scaled(icon, longest)
        x = (number % side + 0.5) * cell + rng.uniform(-0.06, 0.06) * cell
        y = (number // side + 0.5) * cell + rng.uniform(-0.06, 0.06) * cell
        sprites.append(sprite)
        corners.append((round(x - sprite.width / 2), round(y - sprite.height / 2)))
    drawn = _draw(sprites, corners, options.canvas, np.arange(len(sprites)))
    for number, row in enumerate(drawn.objects):
        row |= {"row": number // side + 1, "column": number % side + 1}
    return drawn


def _sized(
    image: Image.Image, mirror: bool, is_target: bool, shrink: float, options: ComposeOptions, rng: np.random.Generator
) -> Image.Image:
    """The cut-out at its size, side and angle."""
    low, high = options.scale if is_target else options.distractor_scale
    longest = shrink * options.canvas * rng.uniform(low, high)
    longest = max(_MIN_SIDE, min(longest, options.max_enlargement * max(image.size)))
    turned = rng.uniform(-options.max_rotation, options.max_rotation)
    mirrored = rng.random() < 0.5
    if mirror and options.mirror and mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = _scaled(image, longest)
    if abs(turned) >= 0.5:
        sprite = sprite.rotate(turned, Image.Resampling.BICUBIC, expand=True)
    box = sprite.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0).getbbox()
    return sprite.crop(box) if box else sprite


def _scaled(image: Image.Image, longest: float) -> Image.Image:
    scale = longest / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _corners(sprites: list[Image.Image], options: ComposeOptions, rng: np.random.Generator) -> list[Corner] | None:
    """Upper left corners with hardly overlapping boxes, or None where things do not fit."""
    room = options.canvas - 2 * _EDGE
    corners: list[Corner] = []
    for sprite in sprites:
        if max(sprite.size) > room:
            return None
        for _ in range(_TRIES):
            left = _EDGE + int(rng.integers(0, room - sprite.width + 1))
            top = _EDGE + int(rng.integers(0, room - sprite.height + 1))
            others = zip(sprites, corners)
            if all(_overlap(sprite, (left, top), other, at) <= options.max_overlap for other, at in others):
                corners.append((left, top))
                break
        else:
            return None
    return corners


def _overlap(one: Image.Image, at: Corner, other: Image.Image, other_at: Corner) -> float:
    """Shared area of two boxes as a part of the smaller one."""
    width = min(at[0] + one.width, other_at[0] + other.width) - max(at[0], other_at[0])
    height = min(at[1] + one.height, other_at[1] + other.height) - max(at[1], other_at[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(one.width * one.height, other.width * other.height)


def _draw(sprites: list[Image.Image], corners: list[Corner], side: int, order: np.ndarray) -> MaskImage:
    """Paste in that order; later ones lie on top."""
    things = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    mask = Image.new("P", (side, side), 0)
    totals = [0] * len(sprites)
    for i in order:
        layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        layer.paste(sprites[i], corners[i])
        things = Image.alpha_composite(things, layer)
        opaque = layer.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
        totals[i] = opaque.histogram()[255]
        mask.paste(int(i) + 1, (0, 0, side, side), opaque)
    mask.putpalette(_PALETTE + [90] * (768 - len(_PALETTE)))
    values = np.asarray(mask)
    rows = []
    for i, total in enumerate(totals):
        ys, xs = np.nonzero(values == i + 1)
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if xs.size else [0, 0, 0, 0]
        visible = math.floor(1000 * xs.size / total) / 1000 if total else 0.0
        rows.append({"box": box, "visible": visible, "value": i + 1})
    return MaskImage(things, mask, rows)
