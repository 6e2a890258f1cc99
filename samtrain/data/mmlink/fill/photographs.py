"""Things on a part of a photograph: pasted, or with a band around them inpainted so that no paste edge remains."""

import numpy as np
from PIL import Image

from samtrain.data.mmlink.fill import Background
from samtrain.data.mmlink.fill.inpaint import Inpainter
from samtrain.data.mmlink.optional import import_cv2
from samtrain.data.mmlink.options import InpaintFillOptions, PhotographFillOptions


class PhotographFiller:
    """The first of some parts of the plate in which every thing stands out; else the one in which they do most."""

    def __init__(self, options: PhotographFillOptions) -> None:
        self.options = options

    def __call__(self, things: Image.Image, background: Background, rng: np.random.Generator) -> Image.Image:
        picture = self.chosen_part(things, background, rng)
        picture.paste(things, mask=things.getchannel("A"))
        return picture

    def chosen_part(self, things: Image.Image, background: Background, rng: np.random.Generator) -> Image.Image:
        assert background.plate is not None  # the plan gives one to every canvas
        best, most = None, -1.0
        for _ in range(self.options.crops):
            part = random_part(background.plate, things.width, self.options.min_crop, rng)
            found = contrast(things, part)
            if found > most:
                best, most = part, found
            if most >= self.options.min_contrast:
                break
        assert best is not None
        return best


class InpaintFiller(PhotographFiller):
    """As `PhotographFiller`; the band of pixels around the things is a hole and filled from both sides."""

    def __init__(self, options: InpaintFillOptions, *, method: str) -> None:
        super().__init__(options)
        self.band = options.band
        self.inpaint = Inpainter(method)
        self.cv2 = import_cv2()

    def __call__(self, things: Image.Image, background: Background, rng: np.random.Generator) -> Image.Image:
        picture = self.chosen_part(things, background, rng)
        picture.paste(things, mask=things.getchannel("A"))
        alpha = np.asarray(things.getchannel("A"))
        size = 2 * self.band + 1
        kernel = self.cv2.getStructuringElement(self.cv2.MORPH_ELLIPSE, (size, size))
        solid = (alpha > 250).astype(np.uint8)
        band = (self.cv2.dilate((alpha > 8).astype(np.uint8), kernel) > 0) & (solid == 0)
        pixels = np.asarray(picture)
        filled = self.inpaint(pixels, band)
        # Away from the thing the photograph comes back: the hole's outer half is a blend, not a smear.
        far = np.clip(self.cv2.distanceTransform(1 - solid, self.cv2.DIST_L2, 5) / (self.band + 1), 0, 1)[..., None]
        mixed = filled * (1 - far) + pixels * far
        return Image.fromarray(np.where(band[..., None], np.round(mixed), pixels).astype(np.uint8))


def random_part(plate: Image.Image, side: int, min_crop: float, rng: np.random.Generator) -> Image.Image:
    """A square part of the plate, [side, side] RGB, mirrored half of the time."""
    shorter = min(plate.size)
    least = min(shorter, max(side, round(min_crop * shorter)))  # never enlarged where it need not be
    crop = int(rng.integers(least, shorter + 1))
    left, top = (int(rng.integers(0, length - crop + 1)) for length in plate.size)
    part = plate.crop((left, top, left + crop, top + crop)).resize((side, side), Image.Resampling.LANCZOS)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def contrast(things: Image.Image, picture: Image.Image, mask: Image.Image | None = None) -> float:
    """How much the least visible thing differs from what is around it: mean colour distance, of 255.

    things: RGBA; what is opaque is one thing, or several by the values of `mask` (P).
    """
    cv2 = import_cv2()
    pixels = np.asarray(things)
    opaque = pixels[..., 3] > 200
    around = np.asarray(picture, dtype=np.float32)
    if mask is None:
        _, labels = cv2.connectedComponents(opaque.astype(np.uint8))
    else:
        labels = np.where(opaque, np.asarray(mask), 0)
    found = []
    for value in range(1, int(labels.max()) + 1):
        inside = (labels == value).astype(np.uint8)
        if inside.sum() < 30:
            continue
        rim = (inside > 0) & (cv2.erode(inside, np.ones((7, 7), np.uint8)) == 0)
        ring = (cv2.dilate(inside, np.ones((11, 11), np.uint8)) > 0) & ~(pixels[..., 3] > 8)
        if not ring.any():
            continue
        difference = pixels[..., :3][rim].astype(np.float32).mean(axis=0) - around[ring].mean(axis=0)
        found.append(float(np.abs(difference).mean()))
    return min(found, default=255.0)
