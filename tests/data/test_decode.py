import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from samtrain.core.errors import DataError
from samtrain.data import decode as decode_module
from samtrain.data.decode import EncodedPicture, decode_image

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


def natural(width, height, seed=0):
    """A picture with the spectrum of photographs: amplitude falls with the frequency."""
    draw = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    channels = [
        np.fft.irfft2(np.fft.rfft2(draw.standard_normal((height, width))) / frequency, s=(height, width))
        for _ in range(3)
    ]
    pixels = np.stack(channels, axis=2)
    return Image.fromarray((128 + 45 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


JPEG_KINDS = {
    "ordinary": ({}, "RGB"),
    "progressive": ({"progressive": True}, "RGB"),
    "full colour resolution": ({"subsampling": 0}, "RGB"),
    "stored as RGB": ({"keep_rgb": True}, "RGB"),
    "restart markers": ({"restart_marker_rows": 1}, "RGB"),
    "grey": ({}, "L"),
    "four inks": ({}, "CMYK"),
}


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_pixels_are_pils_at_every_reduction(kind, reduction):
    options, mode = JPEG_KINDS[kind]
    data = encoded(natural(307, 243).convert(mode), "JPEG", **options)
    pixels, done = EncodedPicture(data, max_pixels=10**6, where="k").pixels(reduction=reduction)
    assert done == (1 if mode == "CMYK" else reduction)  # which is decoded by PIL, in full
    with Image.open(io.BytesIO(data)) as expected:
        expected.draft(None, (307 // done, 243 // done))
        assert np.array_equal(pixels, expected.convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [1, 2])
def test_every_orientation_is_turned_as_pil_turns_it(orientation, reduction):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(natural(64, 48), "JPEG", exif=exif)
    picture = EncodedPicture(data, max_pixels=10**6, where="k")
    pixels, done = picture.pixels(reduction=reduction)
    with Image.open(io.BytesIO(data)) as stored:
        stored.draft(None, (64 // reduction, 48 // reduction))
        expected = ImageOps.exif_transpose(stored)
    assert done == reduction and np.array_equal(pixels, expected)
    assert (picture.width, picture.height) == ((64, 48) if orientation < 5 else (48, 64))


def test_of_several_pictures_in_one_file_the_first_is_read():
    data = encoded(natural(40, 32), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 32), RED)])
    pixels, done = EncodedPicture(data, max_pixels=10**6, where="k").pixels(reduction=2)
    first = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert done == 1 and np.array_equal(pixels, first)


def test_other_formats_are_decoded_in_full():
    for image_format in ("PNG", "WEBP"):
        data = encoded(natural(64, 48), image_format)
        pixels, done = EncodedPicture(data, max_pixels=10**6, where="k").pixels(reduction=2)
        assert done == 1 and pixels.shape == (48, 64, 3)


def test_what_pil_forgives_is_decoded_though_the_fast_decoder_refuses_it():
    data = encoded(natural(64, 48), "JPEG")
    start = data.index(b"\xff\xda")
    forgiven = data[:start] + b"\x00" + data[start:]  # a stray byte between segments
    with pytest.raises(ValueError, match="extraneous"):
        decode_module.simplejpeg.decode_jpeg(forgiven)
    with Image.open(io.BytesIO(data)) as whole:
        assert np.array_equal(decode(forgiven), whole)


def test_a_header_that_the_decoders_read_differently_is_left_to_pil(monkeypatch):
    data = encoded(natural(64, 48), "JPEG")
    monkeypatch.setattr(decode_module.simplejpeg, "decode_jpeg_header", lambda data: (4800, 6400, "YCbCr", "420"))
    monkeypatch.setattr(decode_module.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("was not allowed"))
    assert decode(data).size == (64, 48)
