"""Plates: photographs without the things that stand out in them, so that things can be put there. Once a photograph."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from samtrain.data.mmlink.fill.inpaint import Inpainter
from samtrain.data.mmlink.optional import import_cv2
from samtrain.data.mmlink.options import PlatesOptions
from samtrain.data.mmlink.segment import Segmenter

_BLACK, _RINGING = 24, 2  # brightest value in a bar; lines beside it that JPEG blurs into the picture
_SEGMENTED_SIDE = 384  # pixels: what stands out is seen at any size, and outlines are grown anyway


@dataclass(frozen=True)
class Plate:
    """removed: part of the picture that was inpainted; 0 where nothing was."""

    image: Image.Image
    removed: float


def clean_plate(photograph: Image.Image, segmenter: Segmenter | None, options: PlatesOptions) -> Plate:
    """Segment what stands out, and inpaint it; a picture of which most would go shows no thing, and stays."""
    photograph = without_bars(photograph.convert("RGB"))
    if segmenter is None or not options.remove:
        return Plate(photograph, 0.0)
    cv2 = import_cv2()
    small = photograph.copy()
    small.thumbnail((_SEGMENTED_SIDE, _SEGMENTED_SIDE), Image.Resampling.LANCZOS)
    found = cv2.resize(segmenter(small), photograph.size, interpolation=cv2.INTER_LINEAR)
    holes = (found > 0.5).astype(np.uint8)
    size = 2 * options.grow + 1
    grown = cv2.dilate(holes, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))) > 0
    removed = float(grown.mean())
    if not 0 < removed <= options.max_removed:
        return Plate(photograph, 0.0)
    pixels = Inpainter(options.inpaint)(np.asarray(photograph), grown)
    return Plate(Image.fromarray(pixels), removed)


def without_bars(photograph: Image.Image) -> Image.Image:
    """RGB, less the black bars that some photographs have at their edges."""
    bright = np.asarray(photograph).max(axis=2) > _BLACK
    edges = []
    for lines in (bright.mean(axis=1) > 0.01, bright.mean(axis=0) > 0.01):
        shown = np.flatnonzero(lines)
        if not shown.size:
            return photograph
        first, last = int(shown[0]), int(shown[-1]) + 1
        edges.append((first + _RINGING * (first > 0), last - _RINGING * (last < lines.size)))
    (top, bottom), (left, right) = edges
    if min(bottom - top, right - left) < 2 * min(photograph.size) // 3:  # night, not a frame
        return photograph
    return photograph.crop((left, top, right, bottom))
