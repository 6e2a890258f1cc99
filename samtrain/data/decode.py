"""Encoded bytes to RGB pictures: untrusted bytes in, bounded work, or an error that names the image.

Only JPEG, PNG and WEBP; the header's size is checked before anything is decoded; EXIF orientation is applied; alpha
is laid on white; truncated files are refused. Augmentation draws from (seed, epoch, key, image), so a picture is cut
alike whichever rank or thread decodes it.
"""

import io
import math
import random
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from samtrain.core.errors import DataError
from samtrain.core.seeds import derive_seed

FORMATS = ("JPEG", "PNG", "WEBP")
CROP_SCALE = (0.5, 1.0)  # share of the area, as the authors train
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
_ORIENTATION = 0x0112


class ImageTooLargeError(DataError):
    """A picture has more pixels than allowed."""


def decode_image(data: bytes, *, max_pixels: int, where: str) -> Image.Image:
    """Decode one picture to RGB.

    Args:
        max_pixels: width x height allowed, read from the header before decoding.
        where: names the image in errors.

    Raises:
        ImageTooLargeError: more pixels than `max_pixels`.
        DataError: unknown format, truncated or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageTooLargeError(
                    f"{where}: {image.width} x {image.height} pixels, more than data.max_image_pixels = {max_pixels}"
                )
            image.load()
            return _to_rgb(_upright(image))
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{where}: cannot be decoded: not a JPEG, PNG or WEBP image") from None
    except Image.DecompressionBombError as error:  # PIL's own limit, met before ours where that one is higher
        raise ImageTooLargeError(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from None
    except Exception as error:  # PIL raises many kinds on hostile bytes: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from None


def augment_image(
    image: Image.Image, *, size: int, horizontal_flip: bool, seed: int, epoch: int, key: str, image_index: int
) -> Image.Image:
    """RandomResizedCrop to `size` x `size` (bicubic) and, where allowed, a flip with probability 1/2."""
    draw = random.Random(derive_seed(seed, "augment", epoch, key, image_index))
    image = image.crop(_random_crop(image.width, image.height, draw)).resize((size, size), Image.Resampling.BICUBIC)
    if horizontal_flip and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _random_crop(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): a random share of the area and aspect ratio; the centre where none fits."""
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


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Any) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip everything above 255 to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")
