"""Backgrounds without any source: mmlink-mini's generated ones, and one colour (for icons)."""

import numpy as np
from PIL import Image

from samtrain.data.mini.backgrounds import make_background
from samtrain.data.mmlink.fill import Background


class GeneratedFiller:
    """Colours, patterns, simple landscapes."""

    def __call__(self, things: Image.Image, background: Background, rng: np.random.Generator) -> Image.Image:
        picture, _ = make_background(rng, size=things.width, held_out=background.held_out)
        picture.paste(things, mask=things.getchannel("A"))
        return picture


def on_plain(things: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Icons on a light colour."""
    low, high = 205, 256
    colour = tuple(int(value) for value in rng.integers(low, high, size=3))
    picture = Image.new("RGB", things.size, colour)
    picture.paste(things, mask=things.getchannel("A"))
    return picture
