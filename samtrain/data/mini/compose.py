"""From a plan's picture to a JPEG, its mask and its boxes.

Free layout: random scale and position, boxes hardly overlap. Grid layout: things on five places (four corners and the
centre), so that "top left" is never in doubt, and the nearest neighbour of the target is nearest by a clear margin.
A picture that hides more than `1 - MIN_VISIBLE` of a thing is drawn again.

Pixels: boxes are [left, top, right, bottom), right and bottom exclusive, around the visible pixels of the mask.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from samtrain.data.mini.art import Stock
from samtrain.data.mini.backgrounds import make_background
from samtrain.data.mini.plans import Thing
from samtrain.data.mini.texts import PLACES
from samtrain.data.mini.vocabulary import ANIMAL, phrase

SIZE = 224
MIN_VISIBLE = 0.85
MIN_SIDE = 40  # of a target, in pixels
MARGIN = 10.0  # by which the nearest neighbour is nearer than the next, in pixels
_JPEG_QUALITY = 90
_ATTEMPTS = 60
# Centres of PLACES, in their order.
_NEAR, _FAR, _MIDDLE = 48, SIZE - 48, SIZE // 2
_PLACE_CENTRES = ((_NEAR, _NEAR), (_FAR, _NEAR), (_NEAR, _FAR), (_FAR, _FAR), (_MIDDLE, _MIDDLE))
_PALETTE = [0, 0, 0, 230, 60, 60, 60, 160, 230, 240, 190, 40, 80, 190, 90, 170, 90, 200]
_OPAQUE = [255 if alpha > 127 else 0 for alpha in range(256)]


@dataclass(frozen=True)
class Picture:
    """A composed picture. `objects`: JSON-able, in the plan's order (the target first), `value` is its mask value."""

    jpeg: bytes
    mask_png: bytes
    objects: list[dict[str, Any]]
    background: str


def compose(
    things: tuple[Thing, ...], *, layout: str, stock: Stock, rng: np.random.Generator, held_out_background: bool
) -> Picture:
    """Draw one picture. layout: "alone" | "free" | "grid"."""
    for attempt in range(_ATTEMPTS):
        shrink = 0.97**attempt
        sprites = [_sprite(thing, layout, i == 0, shrink, stock, rng) for i, thing in enumerate(things)]
        spots = _spots(sprites, layout, rng)
        if spots is None:
            continue
        corners, places = spots
        order = rng.permutation(len(things))
        mask = _mask(sprites, corners, order)
        objects = _describe(things, sprites, mask, places)
        if objects is not None and (layout != "grid" or nearest(objects) is not None):
            break
    else:
        raise AssertionError(f"no layout for {[thing.identity.label for thing in things]} in {_ATTEMPTS} attempts")
    canvas, background = make_background(rng, size=SIZE, held_out=held_out_background)
    for i in order:
        canvas.paste(sprites[i], corners[i], sprites[i])
    jpeg, png = io.BytesIO(), io.BytesIO()
    canvas.save(jpeg, "JPEG", quality=_JPEG_QUALITY)
    mask.putpalette(_PALETTE)
    mask.save(png, "PNG", compress_level=6)
    return Picture(jpeg.getvalue(), png.getvalue(), objects, background)


def nearest(objects: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The thing whose centre is nearest to the target's (the first one), or None where two are about as near."""
    target, *others = objects
    distances = sorted((math.dist(_centre(target["box"]), _centre(other["box"])), i) for i, other in enumerate(others))
    if not distances or (len(distances) > 1 and distances[1][0] - distances[0][0] < MARGIN):
        return None
    return others[distances[0][1]]


def _sprite(
    thing: Thing, layout: str, is_target: bool, shrink: float, stock: Stock, rng: np.random.Generator
) -> Image.Image:
    """The drawing at its size and angle, cropped to its pixels. Animals may look the other way."""
    low, high = {"alone": (110, 160), "grid": (54, 74), "free": (64, 112) if is_target else (46, 88)}[layout]
    side = max(MIN_SIDE + 6, shrink * rng.uniform(low, high))
    sprite = stock.sprite(thing.identity.label, thing.style)
    if thing.identity.kind.task == ANIMAL and rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side / max(sprite.size)
    size = (max(1, round(scale * sprite.width)), max(1, round(scale * sprite.height)))
    sprite = sprite.resize(size, Image.Resampling.BILINEAR)
    sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    return sprite.crop(sprite.getchannel("A").point(_OPAQUE).getbbox())


def _spots(
    sprites: list[Image.Image], layout: str, rng: np.random.Generator
) -> tuple[list[tuple[int, int]], list[str]] | None:
    """Upper left corners, and names of places in the grid layout; None where things do not fit."""
    if layout == "grid":
        chosen = [int(place) for place in rng.permutation(len(PLACES))[: len(sprites)]]
        centres = [[coordinate + rng.uniform(-11, 11) for coordinate in _PLACE_CENTRES[place]] for place in chosen]
        corners = [_inside(sprite, *centre) for sprite, centre in zip(sprites, centres)]
        return corners, [PLACES[place] for place in chosen]
    if layout == "alone":
        return [_inside(sprites[0], *rng.uniform(_MIDDLE - 20, _MIDDLE + 20, size=2))], [""]
    corners = []
    for sprite in sprites:
        for _ in range(12):
            corner = _inside(sprite, *rng.uniform(0, SIZE, size=2))
            if all(_overlap(sprite, corner, *other) <= 0.1 for other in zip(sprites, corners)):
                corners.append(corner)
                break
        else:
            return None
    return corners, [""] * len(sprites)


def _inside(sprite: Image.Image, x: float, y: float) -> tuple[int, int]:
    """The upper left corner that centres the sprite on (x, y), moved so that it is inside the picture."""
    left, top = round(x - sprite.width / 2), round(y - sprite.height / 2)
    return min(max(left, 2), SIZE - 2 - sprite.width), min(max(top, 2), SIZE - 2 - sprite.height)


def _overlap(one: Image.Image, at: tuple[int, int], other: Image.Image, other_at: tuple[int, int]) -> float:
    """Shared area of two boxes as a part of the smaller box."""
    width = min(at[0] + one.width, other_at[0] + other.width) - max(at[0], other_at[0])
    height = min(at[1] + one.height, other_at[1] + other.height) - max(at[1], other_at[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(one.width * one.height, other.width * other.height)


def _mask(sprites: list[Image.Image], corners: list[tuple[int, int]], order: np.ndarray) -> Image.Image:
    """[SIZE, SIZE] palette image: 0 is background, i + 1 is thing i where it is visible."""
    mask = Image.new("P", (SIZE, SIZE), 0)
    for i in order:
        mask.paste(int(i) + 1, (*corners[i], *_far_corner(sprites[i], corners[i])), _opaque(sprites[i]))
    return mask


def _far_corner(sprite: Image.Image, corner: tuple[int, int]) -> tuple[int, int]:
    return corner[0] + sprite.width, corner[1] + sprite.height


def _opaque(sprite: Image.Image) -> Image.Image:
    return sprite.getchannel("A").point(_OPAQUE)


def _describe(
    things: tuple[Thing, ...], sprites: list[Image.Image], mask: Image.Image, places: list[str]
) -> list[dict[str, Any]] | None:
    """One row per thing; None where one of them is hidden too much."""
    visible = mask.histogram()
    rows = []
    for i, (thing, sprite, place) in enumerate(zip(things, sprites, places)):
        fraction = visible[i + 1] / max(1, _opaque(sprite).histogram()[255])
        box = mask.point([255 if value == i + 1 else 0 for value in range(256)], "L").getbbox()
        if box is None or fraction < MIN_VISIBLE or (i == 0 and max(box[2] - box[0], box[3] - box[1]) < MIN_SIDE):
            return None
        row: dict[str, Any] = {
            "identity": thing.identity.label,
            "name": phrase(thing.identity.label),
            "kind": thing.identity.kind.name,
            "style": thing.style,
            "box": list(box),
            "visible": round(fraction, 3),
            "value": i + 1,
        }
        rows.append(row | ({"place": place} if place else {}))
    return rows


def _centre(box: list[int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
