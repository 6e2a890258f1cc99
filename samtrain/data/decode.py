"""Encoded bytes to RGB pictures: untrusted bytes in, bounded work, or an error that names the image.

Only JPEG, PNG and WEBP; the header's size is checked before anything is decoded; EXIF orientation is applied; alpha
is laid on white; truncated files are refused.

PIL reads the header and judges. Ordinary JPEGs are decoded by simplejpeg, the same libjpeg-turbo without PIL's copies
(equal pixels, a quarter less time; tested); whatever it complains about is decoded by PIL, whose word counts.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from samtrain.core.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
REDUCTIONS = (8, 4, 2)  # libjpeg-turbo also has thirds and fifths of 8, but slower than decoding in full
_ORIENTATION = 0x0112
# EXIF orientation -> how the stored rows and columns are turned: transposed first, then reversed.
_TURNS: dict[int, tuple[bool, bool, bool]] = {  # (transposed, rows reversed, columns reversed)
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageTooLargeError(DataError):
    """A picture has more pixels than allowed."""


class EncodedPicture:
    """A picture whose header was read and allowed. width, height: as seen upright.

    Args:
        max_pixels: width x height allowed, read from the header before anything is decoded.
        where: names the image in errors.

    Raises:
        ImageTooLargeError: more pixels than `max_pixels`.
        DataError: unknown format, or a damaged header.
    """

    def __init__(self, data: bytes, *, max_pixels: int, where: str) -> None:
        self._data = data
        self._where = where
        with _naming(where):
            self._image = Image.open(io.BytesIO(data), formats=FORMATS)
            if self._image.width * self._image.height > max_pixels:
                raise ImageTooLargeError(
                    f"{where}: {self._image.width} x {self._image.height} pixels, more than "
                    f"data.max_image_pixels = {max_pixels}"
                )
            self._orientation = self._image.getexif().get(_ORIENTATION, 1)
        turned = _TURNS.get(self._orientation, _TURNS[1])[0]
        self.width, self.height = self._image.size[::-1] if turned else self._image.size

    def pixels(self, *, reduction: int = 1) -> tuple[np.ndarray, int]:
        """[height, width, 3] uint8 RGB, and the reduction that was done: of ordinary JPEGs `reduction`, else 1.

        Args:
            reduction: 2, 4 or 8 decode a JPEG to 1/2, 1/4 or 1/8 of each side, rounded up, in less time.

        Raises:
            DataError: truncated or damaged.
        """
        with _naming(self._where):
            pixels = self._jpeg_pixels(reduction)
            if pixels is not None:
                return pixels, reduction
            with self._image as image:
                image.load()
                upright = image if self._orientation == 1 else ImageOps.exif_transpose(image)
                return np.array(_to_rgb(upright)), 1

    def _jpeg_pixels(self, reduction: int) -> np.ndarray | None:
        """None where PIL has to see to it: no ordinary JPEG, damaged, or not what PIL takes it for."""
        # CMYK and multi-picture files are rare, and PIL's reading of them is what we promise.
        if self._image.format != "JPEG" or self._image.mode not in ("RGB", "L") or self._orientation not in _TURNS:
            return None
        width, height = (-(-side // reduction) for side in self._image.size)
        try:
            # Both must have found the same header: its size is what was allowed.
            if simplejpeg.decode_jpeg_header(self._data)[:2] != self._image.size[::-1]:
                return None
            pixels = simplejpeg.decode_jpeg(
                self._data, min_height=height, min_width=width, min_factor=reduction, strict=True
            )
        except ValueError:
            return None
        if pixels.shape != (height, width, 3):
            return None
        transposed, rows_reversed, columns_reversed = _TURNS[self._orientation]
        if transposed:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1]


def decode_image(data: bytes, *, max_pixels: int, where: str) -> Image.Image:
    """Decode one picture to RGB, in full; arguments and errors as of `EncodedPicture`."""
    pixels, _ = EncodedPicture(data, max_pixels=max_pixels, where=where).pixels()
    return Image.fromarray(np.ascontiguousarray(pixels))


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Whatever decoding raises, as a DataError that names the image."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{where}: cannot be decoded: not a JPEG, PNG or WEBP image") from None
    except Image.DecompressionBombError as error:  # PIL's own limit, met before ours where that one is higher
        raise ImageTooLargeError(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from None
    except Exception as error:  # PIL raises many kinds on hostile bytes: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from None


def _to_rgb(image: Any) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip everything above 255 to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")
