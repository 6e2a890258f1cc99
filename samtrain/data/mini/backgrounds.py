"""Backgrounds made from numbers: flat, graded, textured, patterned, and simple landscapes.

Training and test draw from different colours (hues alternate around the circle) and different seeds.
All are soft, so that what is pasted on them stands out.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
_HUES = 12
_HUE_NAMES = (
    "red",
    "orange",
    "yellow",
    "lime",
    "green",
    "mint",
    "turquoise",
    "azure",
    "blue",
    "violet",
    "magenta",
    "pink",
)
STYLES = ("plain", "graded", "cloudy", "striped", "checked", "landscape", "room")


def make_background(rng: np.random.Generator, *, size: int, held_out: bool) -> tuple[Image.Image, str]:
    """An RGB picture of size x size, and its description. `held_out`: from the colours that training never sees."""
    style = STYLES[rng.integers(len(STYLES))]
    hue, other = (2 * int(i) + int(held_out) for i in rng.integers(_HUES // 2, size=2))
    first, second = _pastel(rng, hue), _pastel(rng, other)
    names = (_HUE_NAMES[hue], _HUE_NAMES[other])
    if style == "plain":
        return Image.new("RGB", (size, size), first), f"a plain {names[0]} background"
    if style == "graded":
        return _graded(first, second, size), f"a background that goes from {names[0]} to {names[1]}"
    if style == "cloudy":
        return _cloudy(rng, first, second, size), f"a cloudy {names[0]} and {names[1]} texture"
    if style == "striped":
        return _striped(rng, first, size), f"{names[0]} stripes"
    if style == "checked":
        return _checked(rng, first, size), f"a {names[0]} check pattern"
    if style == "landscape":
        return _landscape(rng, first, second, size), f"{names[1]} hills under a {names[0]} sky"
    return _room(rng, first, second, size), f"a room with a {names[0]} wall and a {names[1]} floor"


def _pastel(rng: np.random.Generator, hue: int) -> Color:
    """A light colour of one of the hues: saturation 0.15-0.4, value 0.8-0.97."""
    angle = (hue + rng.uniform(-0.3, 0.3)) / _HUES
    red, green, blue = colorsys.hsv_to_rgb(angle % 1, rng.uniform(0.15, 0.4), rng.uniform(0.8, 0.97))
    return int(255 * red), int(255 * green), int(255 * blue)


def _shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, int(factor * value)) for value in color)
    return red, green, blue


def _graded(first: Color, second: Color, size: int) -> Image.Image:
    return Image.composite(
        Image.new("RGB", (size, size), first),
        Image.new("RGB", (size, size), second),
        Image.linear_gradient("L").resize((size, size)),
    )


def _cloudy(rng: np.random.Generator, first: Color, second: Color, size: int) -> Image.Image:
    cells = int(rng.integers(4, 12))
    noise = Image.fromarray(rng.integers(0, 256, size=(cells, cells), dtype=np.uint8))
    mask = noise.resize((size, size), Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", (size, size), first), Image.new("RGB", (size, size), second), mask)


def _striped(rng: np.random.Generator, color: Color, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), color)
    draw = ImageDraw.Draw(image)
    width, slant = int(rng.integers(10, 28)), int(rng.integers(-60, 60))
    for left in range(-size, 2 * size, 2 * width):
        corners = [(left, 0), (left + width, 0), (left + width + slant, size), (left + slant, size)]
        draw.polygon(corners, fill=_shade(color, 0.92))
    return image


def _checked(rng: np.random.Generator, color: Color, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), color)
    draw = ImageDraw.Draw(image)
    cell = int(rng.integers(16, 40))
    for row in range(size // cell + 1):
        for column in range(row % 2, size // cell + 1, 2):
            draw.rectangle((column * cell, row * cell, (column + 1) * cell, (row + 1) * cell), fill=_shade(color, 0.92))
    return image


def _landscape(rng: np.random.Generator, sky: Color, ground: Color, size: int) -> Image.Image:
    image = _graded(_shade(sky, 1.08), sky, size)
    draw = ImageDraw.Draw(image)
    columns = np.arange(0, size + 8, 8)
    for depth in range(3):
        height = size * (0.5 + 0.15 * depth) + size * 0.07 * np.sin(
            columns / size * rng.uniform(3, 9) + rng.uniform(0, 6.28)
        )
        hill = [(int(x), int(y)) for x, y in zip(columns, height)]
        draw.polygon([*hill, (size + 8, size), (0, size)], fill=_shade(ground, 1.0 - 0.1 * depth))
    return image


def _room(rng: np.random.Generator, wall: Color, floor: Color, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), wall)
    draw = ImageDraw.Draw(image)
    top = int(size * rng.uniform(0.55, 0.8))
    draw.rectangle((0, top, size, size), fill=_shade(floor, 0.85))
    draw.rectangle((0, top - 4, size, top), fill=_shade(wall, 0.8))
    vanishing = int(rng.integers(0, size))
    for foot in range(-size, 2 * size, 48):
        draw.line((vanishing + (foot - vanishing) // 3, top, foot, size), fill=_shade(floor, 0.78))
    return image
