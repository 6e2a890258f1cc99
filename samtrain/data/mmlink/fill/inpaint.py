"""Classical inpainting: OpenCV's TELEA (fast, smooth) and PatchMatch (slower, keeps texture)."""

from typing import Any

import numpy as np

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.optional import import_cv2, import_optional

METHODS = ("telea", "patchmatch")
_RADIUS = 4  # pixels around a hole that TELEA looks at
_PATCH = 3


class Inpainter:
    """Fills holes of a picture from what is around them.

    Raises:
        ConfigError: the library of the method is not installed.
    """

    def __init__(self, method: str) -> None:
        assert method in METHODS, method
        self.method = method
        self.cv2 = import_cv2()
        self.patchmatch: Any = None
        if method == "patchmatch":
            module = import_optional("patchmatch", needed_for="inpainting by PatchMatch")
            if not module.patchmatch_available:
                raise ConfigError(
                    "inpainting by PatchMatch: the native library of `pypatchmatch` cannot be loaded here"
                )
            self.patchmatch = module.patch_match

    def __call__(self, pixels: np.ndarray, holes: np.ndarray) -> np.ndarray:
        """[H, W, 3] uint8 and [H, W] bool -> [H, W, 3] uint8; what is no hole stays as it is."""
        if not holes.any():
            return pixels
        if holes.all():
            return np.full_like(pixels, 127)
        if self.patchmatch is not None and min(pixels.shape[:2]) > 2 * _PATCH:
            self.patchmatch.set_random_seed(0)  # the same picture is filled alike, whatever was filled before
            filled = self.patchmatch.inpaint(pixels.copy(), holes.astype(np.uint8) * 255, patch_size=_PATCH)
        else:
            filled = self.cv2.inpaint(
                np.ascontiguousarray(pixels), holes.astype(np.uint8), _RADIUS, self.cv2.INPAINT_TELEA
            )
        return np.where(holes[..., None], filled, pixels)
