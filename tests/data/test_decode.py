import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data.decode import _random_crop, augment_image, decode_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, image_format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def decode(data, max_pixels=10_000):
    return decode_image(data, max_pixels=max_pixels, where="k.0.png")


def png_that_claims(width, height):
    """A PNG whose header promises width x height pixels and whose data is a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_known_formats_are_decoded_to_rgb(image_format):
    image = decode(encoded(Image.new("RGB", (9, 7), RED), image_format))
    assert image.mode == "RGB" and image.size == (9, 7)
    assert np.abs(np.array(image).astype(int) - RED).max() <= 3  # lossy formats


@pytest.mark.parametrize("image_format", ["BMP", "GIF", "TIFF", "ICO", "EPS", "PPM"])
def test_other_formats_are_refused(image_format):
    with pytest.raises(DataError, match=r"k\.0\.png: cannot be decoded"):
        decode(encoded(Image.new("RGB", (16, 16)), image_format))


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (*RED, 255))
    decoded = decode(encoded(image))
    assert decoded.getpixel((0, 0)) == WHITE and decoded.getpixel((1, 0)) == RED


def test_half_transparent_pixels_are_mixed_with_white():
    decoded = decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51))))
    assert decoded.getpixel((0, 0)) == (204, 204, 204)


def test_palettes_with_a_transparent_colour_are_resolved():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    decoded = decode(encoded(image, transparency=1))
    assert decoded.getpixel((0, 0)) == RED and decoded.getpixel((1, 0)) == WHITE


def test_grey_with_alpha_and_cmyk_are_converted():
    assert decode(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == WHITE
    assert decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == WHITE


def test_sixteen_bit_grey_keeps_its_greys():
    grey = Image.fromarray(np.full((1, 1), 0x8000, dtype=np.uint16))
    assert decode(encoded(grey)).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_turns_the_picture():
    image = Image.new("RGB", (16, 8), WHITE)
    image.paste(RED, (0, 0, 8, 8))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    decoded = decode(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0))
    assert decoded.size == (8, 16)
    assert decoded.getpixel((4, 2))[1] < 10 and decoded.getpixel((4, 13))[1] > 245


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_refused(image_format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    whole = encoded(noise, image_format)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(whole[: int(len(whole) * share)])


def test_a_pixel_bomb_is_refused_by_its_header():
    with pytest.raises(DataError, match=r"12000 x 9000 pixels, more than data\.max_image_pixels = 64000000"):
        decode(png_that_claims(12_000, 9_000), max_pixels=64_000_000)
    with pytest.raises(DataError, match=r"k\.0\.png: cannot be decoded: DecompressionBombError"):
        decode(png_that_claims(60_000, 60_000), max_pixels=64_000_000)


def test_the_limit_itself_is_allowed():
    data = encoded(Image.new("RGB", (10, 10)))
    assert decode(data, max_pixels=100).size == (10, 10)
    with pytest.raises(DataError):
        decode(data, max_pixels=99)


def test_random_bytes_and_mutations_never_raise_anything_but_data_errors():
    draw = np.random.default_rng(1)
    noise = Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for image_format in ("JPEG", "PNG", "WEBP"):
        whole = encoded(noise, image_format)
        for _ in range(150):
            data = bytearray(whole)
            for place in draw.integers(0, len(data), 6):
                data[place] = draw.integers(0, 256)
            with contextlib.suppress(DataError):
                decode(bytes(data))


def augmented(image, **changes):
    values = {"size": 32, "horizontal_flip": True, "seed": 1, "epoch": 0, "key": "k", "image_index": 0} | changes
    return np.array(augment_image(image, **values))


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_augmentation_is_a_function_of_seed_epoch_key_and_image(picture):
    first = augmented(picture)
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, augmented(picture))
    for change in ({"seed": 2}, {"epoch": 1}, {"key": "l"}, {"image_index": 1}):
        assert not np.array_equal(first, augmented(picture, **change))


def test_crops_stay_inside_and_keep_the_authors_scale_and_ratio():
    import random

    draw = random.Random(0)
    boxes = [_random_crop(400, 300, draw) for _ in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert 0.745 < (right - left) / (bottom - top) < 1.345  # 3/4 to 4/3, rounded to pixels
    areas = np.array([(r - x) * (b - t) / 120_000 for x, t, r, b in boxes])
    assert 0.495 < areas.min() < 0.52 and 0.95 < areas.max() <= 1
    assert {left for left, *_ in boxes} > {0, 1, 2, 3} and {top for _, top, *_ in boxes} > {0, 1, 2, 3}


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_shapes_have_a_crop(size):
    import random

    for seed in range(20):
        left, top, right, bottom = _random_crop(*size, random.Random(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_half_of_the_pictures_are_flipped_and_none_when_forbidden(picture):
    flips = 0
    for seed in range(200):
        plain = augmented(picture, seed=seed, horizontal_flip=False)
        allowed = augmented(picture, seed=seed, horizontal_flip=True)
        if not np.array_equal(plain, allowed):
            assert np.array_equal(plain[:, ::-1], allowed)
            flips += 1
    assert 70 < flips < 130  # 100 expected, 4 standard deviations
