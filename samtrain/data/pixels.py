"""Encoded bytes to the square picture a model sees: a part of the picture, resized, perhaps flipped.

What is seen is drawn from (seed, epoch, key, image) and the size in the header alone, before anything is decoded. So a
picture is cut alike whichever rank or thread decodes it, and at whichever scale: the edges of a crop that is large
enough to be decoded at 1/2, 1/4 or 1/8 lie on a grid of 2, 4 or 8 pixels, decoded so or not.

Resizing is PIL's antialiased bicubic as torch computes it for bytes: with SIMD, in a quarter of PIL's time. Rounding
differs, by 0.005 of 255 on average, and by 0.25 where one side shrinks and the other hardly does.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samtrain.core.seeds import derive_seed
from samtrain.data.decode import REDUCTIONS, EncodedPicture

CROP_SCALE = (0.5, 1.0)  # share of the area, as the authors train
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Augmentation:
    """RandomResizedCrop and, where allowed, a flip with probability 1/2, of one image of one sample in one epoch."""

    horizontal_flip: bool
    seed: int
    epoch: int
    key: str
    image_index: int

    def draw(self, width: int, height: int, *, size: int) -> tuple[Box, bool]:
        """The part to cut out of a picture of this size for a square of `size` pixels, and whether to flip it."""
        draw = random.Random(derive_seed(self.seed, "augment", self.epoch, self.key, self.image_index))
        left, top, right, bottom = drawn = _random_crop(width, height, draw)
        grid = _reduction(drawn, size)
        box = (
            _nearest(left, grid),
            _nearest(top, grid),
            min(width, _nearest(right, grid)),
            min(height, _nearest(bottom, grid)),
        )
        return box, self.horizontal_flip and draw.random() < 0.5


def load_square(
    data: bytes, *, size: int, augmentation: Augmentation | None, reduced: bool, max_pixels: int, where: str
) -> Tensor:
    """[3, size, size] uint8 RGB of an encoded picture; the whole of it where nothing is augmented.

    Args:
        reduced: decode a JPEG at 1/2, 1/4 or 1/8 where the part that is seen keeps at least `size` pixels each way.
        max_pixels, where: as of `EncodedPicture`.

    Raises:
        DataError: the picture cannot be decoded or is too large.
    """
    picture = EncodedPicture(data, max_pixels=max_pixels, where=where)
    box, is_flipped = (0, 0, picture.width, picture.height), False
    if augmentation is not None:
        box, is_flipped = augmentation.draw(picture.width, picture.height, size=size)
    pixels, reduction = picture.pixels(reduction=_reduction(box, size) if reduced else 1)
    left, top, right, bottom = (-(-edge // reduction) for edge in box)  # exact, but at the picture's own border
    square = resize(pixels[top:bottom, left:right], size)
    return square.flip(2) if is_flipped else square


def resize(pixels: np.ndarray, size: int) -> Tensor:
    """[H, W, 3] uint8 to [3, size, size], antialiased bicubic."""
    pixels = np.ascontiguousarray(pixels)  # of a view torch makes a slower copy, and it has no negative strides
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if pixels.shape[:2] != (size, size):
        batch = torch.nn.functional.interpolate(batch, size=(size, size), mode="bicubic", antialias=True)
    return batch[0].contiguous()


def _reduction(box: Box, size: int) -> int:
    left, top, right, bottom = box
    smaller = min(right - left, bottom - top)
    return next((reduction for reduction in REDUCTIONS if smaller >= reduction * size), 1)


def _nearest(edge: int, grid: int) -> int:
    """Rounded half up: no box gets narrower than its width in whole steps of the grid."""
    return (edge + grid // 2) // grid * grid


def _random_crop(width: int, height: int, draw: random.Random) -> Box:
    """A random share of the area and aspect ratio; the centre where none fits."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * draw.uniform(*CROP_SCALE)
        ratio = math.exp(draw.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.random() * (width - w + 1)), int(draw.random() * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
