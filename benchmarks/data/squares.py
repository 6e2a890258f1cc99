"""JPEG bytes to a [3, 224, 224] float32 tensor: what the peers' rows do with a picture, and the truth.

All rows see the same crops and flips (`samtrain.data.pixels.Augmentation`, drawn from the key) and end with the same
normalisation. Two ways for the peers, and the faster one of each loader counts: PIL, as torchvision's transforms do it
on PIL images, with antialiasing; OpenCV with INTER_AREA. OpenCV's INTER_LINEAR and INTER_CUBIC would be faster still,
but do not look at all pixels when they shrink: their pictures are not these (`gate.py` refuses them).
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samtrain.data.pixels import Augmentation, load_square

SIZE = 224
SEED = 11
MAX_PIXELS = 64_000_000
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
_STD = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
_FACTOR = (1 / (255 * _STD)).astype(np.float32)
_OFFSET = (_MEAN / _STD).astype(np.float32)

Square = Callable[[bytes, str, int], Tensor]  # encoded picture, key, number of the image


def normalise(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 to [3, H, W] float32."""
    result = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    np.multiply(pixels.transpose(2, 0, 1), _FACTOR, out=result)
    result -= _OFFSET
    return torch.from_numpy(result)


def normalise_tensor(pixels: Tensor) -> Tensor:
    """[3, H, W] uint8 to float32, as `SamMllmProcessor.pixel_values` does it."""
    return torch.mul(pixels, torch.from_numpy(_FACTOR)).sub_(torch.from_numpy(_OFFSET))


def to_bytes(pixels: Tensor) -> np.ndarray:
    """The inverse of `normalise`, as float64 in units of a byte."""
    return ((pixels.double().numpy() + _MEAN / _STD) * (255 * _STD)).transpose(1, 2, 0)


def augmentation(key: str, image: int) -> Augmentation:
    return Augmentation(horizontal_flip=True, seed=SEED, epoch=0, key=key, image_index=image)


def pil_square(data: bytes, key: str, image: int) -> Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        box, is_flipped = augmentation(key, image).draw(picture.width, picture.height, size=SIZE)
        square = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    if is_flipped:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return normalise(np.asarray(square))


def cv2_square(data: bytes, key: str, image: int) -> Tensor:
    return _cv2_square(data, key, image, interpolation="INTER_AREA")


def cv2_linear_square(data: bytes, key: str, image: int) -> Tensor:
    """Without antialiasing; here so that a test sees the gate refuse it."""
    return _cv2_square(data, key, image, interpolation="INTER_LINEAR")


def our_square(data: bytes, key: str, image: int) -> Tensor:
    """Our decoding at reduced scale, in another loader's hands: what of our rows is decoding, and what the loader."""
    square = load_square(
        data, size=SIZE, augmentation=augmentation(key, image), reduced=True, max_pixels=MAX_PIXELS, where=key
    )
    return normalise_tensor(square)


def true_square(data: bytes, key: str, image: int) -> np.ndarray:
    """[224, 224, 3] in units of a byte: decoded in full, cut, then PIL's bicubic."""
    with Image.open(io.BytesIO(data)) as picture:
        box, is_flipped = augmentation(key, image).draw(picture.width, picture.height, size=SIZE)
        square = picture.convert("RGB").crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(square).astype(np.float64)
    return pixels[:, ::-1] if is_flipped else pixels


def _cv2_square(data: bytes, key: str, image: int, *, interpolation: str) -> Tensor:
    import cv2

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None, f"{key}: OpenCV cannot decode image {image}"
    (left, top, right, bottom), is_flipped = augmentation(key, image).draw(pixels.shape[1], pixels.shape[0], size=SIZE)
    square = cv2.resize(pixels[top:bottom, left:right], (SIZE, SIZE), interpolation=getattr(cv2, interpolation))
    return normalise(square[:, ::-1] if is_flipped else square)


SQUARES: dict[str, Square] = {
    "pil": pil_square,
    "cv2": cv2_square,
    "cv2_linear": cv2_linear_square,
    "ours": our_square,
}
