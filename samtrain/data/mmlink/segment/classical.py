"""GrabCut (OpenCV): by itself from a centred box, or to snap another segmenter's outline to the picture's edges."""

import numpy as np
from PIL import Image

from samtrain.data.mmlink.optional import import_cv2
from samtrain.data.mmlink.options import GrabCutOptions

_MIN_PIXELS = 12  # GrabCut fits five Gaussians to each side


class GrabCutSegmenter:
    """What is unlike the rim of the picture."""

    def __init__(self, options: GrabCutOptions | None = None) -> None:
        self.options = options or GrabCutOptions()
        self.cv2 = import_cv2()

    def __call__(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        rim = max(1, round(self.options.margin * min(width, height)))
        labels = np.full((height, width), self.cv2.GC_BGD, np.uint8)
        labels[rim:-rim, rim:-rim] = self.cv2.GC_PR_FGD
        return grab_cut(self.cv2, pixels, labels, iterations=self.options.iterations).astype(np.float32)


def snapped(image: Image.Image, sureness: np.ndarray, *, iterations: int = 2) -> np.ndarray:
    """The outline of `sureness` moved to edges of the picture, where the two agree on most of it; else unchanged."""
    cv2 = import_cv2()
    inside = sureness > 0.5
    reach = max(2, round(0.02 * max(image.size)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    sure = cv2.erode(inside.astype(np.uint8), kernel) > 0
    possible = cv2.dilate(inside.astype(np.uint8), kernel) > 0
    labels = np.full(inside.shape, cv2.GC_BGD, np.uint8)
    labels[possible] = cv2.GC_PR_BGD
    labels[inside] = cv2.GC_PR_FGD
    labels[sure] = cv2.GC_FGD
    cut = grab_cut(cv2, np.asarray(image.convert("RGB")), labels, iterations=iterations)
    union = int((cut | inside).sum())
    if not union or int((cut & inside).sum()) / union < 0.75:
        return sureness
    # Half a pixel of softness, as an anti-aliased edge has.
    return np.asarray(cv2.GaussianBlur(cut.astype(np.float32), (3, 3), 0.6))


def grab_cut(cv2, pixels: np.ndarray, labels: np.ndarray, *, iterations: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    """[H, W] bool. Labels are cv2's GC_*; where one side has next to no pixels, they are taken as they are."""
    front = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    if front.sum() < _MIN_PIXELS or (~front).sum() < _MIN_PIXELS:
        return np.asarray(front)
    cv2.setRNGSeed(0)  # its k-means draws; the same picture gives the same cut
    models = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    cv2.grabCut(bgr, labels, None, *models, iterations, cv2.GC_INIT_WITH_MASK)
    return np.asarray((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
