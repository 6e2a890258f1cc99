"""Pictures in and out: untrusted bytes to pixels with limits, and the few operations every stage shares."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from samtrain.data.decode import FORMATS
from samtrain.data.mmlink.records import Rejected

JPEG_QUALITY = 92
Color = tuple[int, int, int]
_GROUNDS: tuple[Color, ...] = (
    (255, 255, 255), (128, 160, 128), (60, 90, 140), (200, 180, 150), (30, 30, 30),
)  # fmt: skip


def open_picture(data: bytes, *, max_pixels: int, max_side: int) -> Image.Image:
    """RGB, or RGBA where the picture has an alpha that matters; upright, at most `max_side` pixels a side.

    Raises:
        Rejected: unknown format, too large, truncated or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Rejected(f"{image.width} x {image.height} pixels, more than pictures.max_pixels = {max_pixels}")
            if image.format == "JPEG":
                image.draft("RGB", (max_side, max_side))  # decoded at a scale that is still large enough
            image.load()
            upright: Any = ImageOps.exif_transpose(image) or image
            picture = _plain(upright)
    except Rejected:
        raise
    except Exception as error:  # PIL raises many kinds on hostile bytes
        raise Rejected(f"cannot be decoded: {type(error).__name__}: {error}") from None
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture


def _plain(image: Any) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return image if image.getchannel("A").getextrema()[0] < 250 else image.convert("RGB")


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)  # kept for a while, and read once or twice
    return stream.getvalue()


def jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def from_png(data: bytes) -> Image.Image:
    """A picture that a stage wrote."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        return image.copy()


def flattened(image: Image.Image, color: Color) -> Image.Image:
    """RGB: what is transparent shows `color`."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, color)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def standing_out(image: Image.Image) -> Color:
    """Of a few plain colours, the one that an RGBA picture differs from most: its edge, and what lies inside it (a
    white eye on white would be a hole)."""
    pixels = np.asarray(image).astype(np.int32)
    alpha = pixels[..., 3] > 127
    inner = alpha.copy()
    inner[1:-1, 1:-1] &= alpha[:-2, 1:-1] & alpha[2:, 1:-1] & alpha[1:-1, :-2] & alpha[1:-1, 2:]
    inner[0, :] = inner[-1, :] = inner[:, 0] = inner[:, -1] = False
    edge, thing = pixels[alpha & ~inner][:, :3], pixels[alpha][:, :3]
    if not edge.size:
        return 255, 255, 255

    def distance(color: Color) -> float:
        far_edge, far_thing = (np.abs(part - np.array(color)).sum(axis=1) for part in (edge, thing))
        return min(float(np.percentile(far_edge, 10)), 2 * float(np.percentile(far_thing, 3)))

    return max(_GROUNDS, key=distance)


def perceptual_hash(image: Image.Image) -> str:
    """64 bits as 16 hex digits: pictures that look alike differ in few."""
    import imagehash

    return str(imagehash.phash(flattened(image, (128, 128, 128))))


def bits_apart(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()
