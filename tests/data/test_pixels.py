import contextlib
import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data import pixels as pixels_module
from samtrain.data.pixels import Augmentation, _random_crop, _reduction, load_square, resize


def natural(width, height, seed=0):
    """Three channels with the spectrum of photographs: amplitude falls with the frequency."""
    draw = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    noise = draw.standard_normal((3, height, width))
    fields = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width)).transpose(1, 2, 0)
    return Image.fromarray((128 + 45 * fields / fields.std()).clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photograph():
    return jpeg(natural(900, 700))


def in_rows(pixels):
    """[3, H, W] uint8 as [H, W, 3] that can be subtracted."""
    return pixels.permute(1, 2, 0).numpy().astype(int)


def square(data, *, size=224, reduced=False, **augmented):
    augmentation = None
    if augmented:
        values = {"horizontal_flip": True, "seed": 1, "epoch": 0, "key": "k", "image_index": 0} | augmented
        augmentation = Augmentation(**values)
    seen = load_square(data, size=size, augmentation=augmentation, reduced=reduced, max_pixels=10**7, where="k")
    assert seen.dtype == torch.uint8 and seen.shape == (3, size, size) and seen.is_contiguous()
    return in_rows(seen)


@pytest.fixture
def reductions(monkeypatch):
    """The reductions that were asked for, in order."""
    asked = []
    decode = pixels_module.EncodedPicture.pixels
    monkeypatch.setattr(
        pixels_module.EncodedPicture,
        "pixels",
        lambda self, *, reduction: asked.append(reduction) or decode(self, reduction=reduction),
    )
    return asked


@pytest.mark.parametrize("width_height", [(900, 700), (300, 500), (224, 224), (100, 80), (7, 1)])
def test_resizing_is_pils_bicubic_up_to_rounding(width_height):
    image = natural(*width_height)
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(in_rows(resize(np.array(image), 224)) - expected)
    assert difference.max() <= 3 and difference.mean() < 0.25


def test_augmentation_is_a_function_of_seed_epoch_key_and_image(photograph):
    first = square(photograph, seed=1)
    assert np.array_equal(first, square(photograph, seed=1))
    for change in ({"seed": 2}, {"epoch": 1}, {"key": "l"}, {"image_index": 1}):
        assert not np.array_equal(first, square(photograph, **change))


def test_an_augmented_picture_is_the_crop_that_was_drawn_flipped_where_drawn(photograph):
    with Image.open(io.BytesIO(photograph)) as image:
        whole = image.convert("RGB")
    flips = set()
    for seed in range(6):
        box, is_flipped = Augmentation(horizontal_flip=True, seed=seed, epoch=0, key="k", image_index=0).draw(
            900, 700, size=224
        )
        expected = whole.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        if is_flipped:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.abs(square(photograph, seed=seed) - np.asarray(expected)).mean() < 0.25
        flips.add(is_flipped)
    assert flips == {True, False}


def test_crops_stay_inside_and_keep_the_authors_scale_and_ratio():
    draw = random.Random(0)
    boxes = [_random_crop(400, 300, draw) for _ in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert 0.745 < (right - left) / (bottom - top) < 1.345  # 3/4 to 4/3, rounded to pixels
    areas = np.array([(r - x) * (b - t) / 120_000 for x, t, r, b in boxes])
    assert 0.495 < areas.min() < 0.52 and 0.95 < areas.max() <= 1
    assert {left for left, *_ in boxes} > {0, 1, 2, 3} and {top for _, top, *_ in boxes} > {0, 1, 2, 3}


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_shapes_have_a_crop_and_can_be_loaded(size):
    for seed in range(20):
        left, top, right, bottom = _random_crop(*size, random.Random(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    square(jpeg(natural(*size)), size=32, reduced=True, seed=3)


def test_half_of_the_pictures_are_flipped_and_none_when_forbidden():
    def flips(horizontal_flip):
        draws = (Augmentation(horizontal_flip, seed, 0, "k", 0).draw(60, 40, size=32) for seed in range(200))
        return sum(is_flipped for _, is_flipped in draws)

    assert 70 < flips(True) < 130  # 100 expected, 4 standard deviations
    assert flips(False) == 0


def test_a_crop_lies_on_the_grid_of_its_reduction_and_keeps_the_targets_pixels():
    draw = random.Random(0)
    reductions = set()
    for seed in range(3000):
        width, height = draw.randint(1, 3000), draw.randint(1, 3000)
        augmentation = Augmentation(horizontal_flip=False, seed=seed, epoch=0, key="k", image_index=0)
        left, top, right, bottom = box = augmentation.draw(width, height, size=224)[0]
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        reduction = _reduction(box, 224)
        reductions.add(reduction)
        assert left % reduction == top % reduction == 0
        assert right == width or right % reduction == 0
        assert bottom == height or bottom % reduction == 0
        smaller = min(right - left, bottom - top)
        assert reduction * 224 <= smaller or reduction == 1
        assert reduction == 8 or smaller < 2 * reduction * 224, "the next reduction would have been allowed"
    assert reductions == {1, 2, 4, 8}


@pytest.mark.parametrize(("size", "expected"), [(700, 1), (350, 2), (175, 4), (87, 8), (10, 8)])
def test_the_reduction_follows_from_what_is_seen(photograph, reductions, size, expected):
    square(photograph, size=size, reduced=True)
    square(photograph, size=size, reduced=False)
    assert reductions == [expected, 1]


def test_reduced_decoding_differs_little_from_decoding_in_full(photograph):
    """Of 255, on content as fine as photographs get. JPEG itself moved these pictures by 2.5."""
    assert 0 < np.abs(square(photograph, reduced=True) - square(photograph)).mean() < 2.5
    for seed in range(8):
        difference = np.abs(square(photograph, reduced=True, seed=seed) - square(photograph, seed=seed))
        assert 0 < difference.mean() < 4.5  # of a crop that is little more than twice the target


def test_pictures_of_phones_are_cut_as_they_are_seen():
    stored = natural(900, 700)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(stored, exif=exif, subsampling=0)
    upright = jpeg(stored.transpose(Image.Transpose.ROTATE_270), subsampling=0)
    for reduced in (False, True):
        difference = square(turned, reduced=reduced, seed=1) - square(upright, reduced=reduced, seed=1)
        assert np.abs(difference).mean() < 2  # two JPEGs of one picture


def test_threads_see_what_one_thread_sees(photograph):
    seeds = list(range(24))
    alone = [square(photograph, reduced=True, seed=seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: square(photograph, reduced=True, seed=seed), seeds))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))


def test_damaged_pictures_are_named_and_never_half_decoded(photograph):
    for share in (0.3, 0.9, 0.999):
        with pytest.raises(DataError, match="k: cannot be decoded"):
            square(photograph[: int(len(photograph) * share)], reduced=True)
    draw = np.random.default_rng(1)
    small = jpeg(natural(64, 48))
    for _ in range(150):
        data = bytearray(small)
        for place in draw.integers(0, len(data), 6):
            data[place] = draw.integers(0, 256)
        with contextlib.suppress(DataError):
            square(bytes(data), size=16, reduced=True, seed=1)
