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
_SPOTS_PER_SIZE = 5  # new positions for the same drawings, before smaller ones are tried
_ATTEMPTS = 20 * _SPOTS_PER_SIZE
# Centres of PLACES, in their order.
_NEAR, _FAR, _MIDDLE = 48, SIZE - 48, SIZE // 2
_PLACE_CENTRES = ((_NEAR, _NEAR), (_FAR, _NEAR), (_NEAR, _FAR), (_FAR, _FAR), (_MIDDLE, _MIDDLE))
_PALETTE = [0, 0, 0, 230, 60, 60, 60, 160, 230, 240, 190, 40, 80, 190, 90, 170, 90, 200]

Corner = tuple[int, int]  # upper left, in pixels


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
        if attempt % _SPOTS_PER_SIZE == 0:
            shrink = 0.9 ** (attempt // _SPOTS_PER_SIZE)
            drawn = [_sprite(thing, layout, i == 0, shrink, stock, rng) for i, thing in enumerate(things)]
            sprites, outlines = [sprite for sprite, _ in drawn], [outline for _, outline in drawn]
        spots = _spots(sprites, layout, rng)
        if spots is None:
            continue
        corners, places = spots
        order = rng.permutation(len(things))
        mask = merged_mask(outlines, corners, order)
        objects = _describe(things, visible_boxes(outlines, mask), places)
        if objects is not None and (layout != "grid" or nearest(objects) is not None):
            break
    else:
        raise AssertionError(f"no layout for {[thing.identity.label for thing in things]} in {_ATTEMPTS} attempts")
    canvas, background = make_background(rng, size=SIZE, held_out=held_out_background)
    return finished(canvas, sprites, corners, order, mask, objects, background)


def finished(
    canvas: Image.Image,
    sprites: list[Image.Image],
    corners: list[Corner],
    order: np.ndarray,
    mask: Image.Image,
    objects: list[dict[str, Any]],
    background: str,
) -> Picture:
    """Paste the sprites in that order and encode picture and mask."""
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
) -> tuple[Image.Image, Image.Image]:
    """The drawing at its size and angle, cropped to its opaque pixels, and their outline. Animals may be mirrored."""
    low, high = {"alone": (96, 132), "grid": (54, 74), "free": (64, 112) if is_target else (46, 88)}[layout]
    side = max(MIN_SIDE + 6, shrink * rng.uniform(low, high))
    sprite = stock.sprite(thing.identity.label, thing.style)
    if thing.identity.kind.task == ANIMAL and rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side / max(sprite.size)
    size = (max(1, round(scale * sprite.width)), max(1, round(scale * sprite.height)))
    sprite = sprite.resize(size, Image.Resampling.BILINEAR)
    sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    outline = opaque(sprite)
    box = outline.getbbox()
    return sprite.crop(box), outline.crop(box)


def _spots(sprites: list[Image.Image], layout: str, rng: np.random.Generator) -> tuple[list[Corner], list[str]] | None:
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
            if all(overlap(sprite, corner, *other) <= 0.1 for other in zip(sprites, corners)):
                corners.append(corner)
                break
        else:
            return None
    return corners, [""] * len(sprites)


def _inside(sprite: Image.Image, x: float, y: float) -> Corner:
    """The upper left corner that centres the sprite on (x, y), moved so that it is inside the picture."""
    left, top = round(x - sprite.width / 2), round(y - sprite.height / 2)
    return min(max(left, 2), SIZE - 2 - sprite.width), min(max(top, 2), SIZE - 2 - sprite.height)


def overlap(one: Image.Image, at: Corner, other: Image.Image, other_at: Corner) -> float:
    """Shared area of two boxes as a part of the smaller box."""
    width = min(at[0] + one.width, other_at[0] + other.width) - max(at[0], other_at[0])
    height = min(at[1] + one.height, other_at[1] + other.height) - max(at[1], other_at[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(one.width * one.height, other.width * other.height)


def merged_mask(outlines: list[Image.Image], corners: list[Corner], order: np.ndarray) -> Image.Image:
    """[SIZE, SIZE] palette image: 0 is background, i + 1 is thing i where it is visible."""
    mask = Image.new("P", (SIZE, SIZE), 0)
    for i in order:
        left, top = corners[i]
        mask.paste(int(i) + 1, (left, top, left + outlines[i].width, top + outlines[i].height), outlines[i])
    return mask


def opaque(sprite: Image.Image) -> Image.Image:
    """ "L" image: 255 where the sprite is more opaque than not, else 0."""
    return Image.fromarray(np.where(np.asarray(sprite.getchannel("A")) > 127, np.uint8(255), np.uint8(0)))


def _box(inside: np.ndarray) -> tuple[int, int, int, int] | None:
    """[left, top, right, bottom) around the True pixels, or None where there is none."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not rows.size:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def visible_boxes(outlines: list[Image.Image], mask: Image.Image) -> list[tuple[list[int], float]] | None:
    """Box and visible fraction of each thing; None where one is hidden too much, or the first is too small."""
    pixels = np.asarray(mask)
    found = []
    for i, outline in enumerate(outlines):
        inside = pixels == i + 1
        fraction = int(inside.sum()) / max(1, int((np.asarray(outline) > 0).sum()))
        box = _box(inside)
        if box is None or fraction < MIN_VISIBLE or (i == 0 and max(box[2] - box[0], box[3] - box[1]) < MIN_SIDE):
            return None
        found.append((list(box), round(fraction, 3)))
    return found


def _describe(
    things: tuple[Thing, ...], visible: list[tuple[list[int], float]] | None, places: list[str]
) -> list[dict[str, Any]] | None:
    """One row per thing; None where there are no boxes."""
    if visible is None:
        return None
    rows = []
    for i, (thing, (box, fraction), place) in enumerate(zip(things, visible, places)):
        row: dict[str, Any] = {
            "identity": thing.identity.label,
            "name": phrase(thing.identity.label),
            "kind": thing.identity.kind.name,
            "style": thing.style,
            "box": box,
            "visible": fraction,
            "value": i + 1,
        }
        rows.append(row | ({"place": place} if place else {}))
    return rows


def _centre(box: list[int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
