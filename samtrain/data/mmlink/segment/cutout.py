"""From a segmenter's sureness to a cut-out thing: RGBA, cropped, without a rim of its old background."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from samtrain.data.mmlink.optional import import_cv2
from samtrain.data.mmlink.pictures import flattened, standing_out
from samtrain.data.mmlink.records import Rejected
from samtrain.data.mmlink.segment import Segmenter

_MARGIN = 0.12  # empty rim around cut-out art before it is segmented: salient things do not touch the frame
_MIN_SIDE = 16
_SPECK = 0.04  # parts smaller than this share of the largest are dropped
_UNLIKE = 45  # colour distance (sum of R, G, B) from the old background at which a hole shows something of the thing


@dataclass(frozen=True)
class CutOut:
    """image: RGBA, cropped. area: part of the picture. agreement: IoU with the picture's own alpha, if it has one."""

    image: Image.Image
    area: float
    agreement: float | None


def cut_out(picture: Image.Image, segmenter: Segmenter, *, own_alpha: bool) -> CutOut:
    """Segment one picture.

    Args:
        own_alpha: take a picture's own alpha where it has one, as it is.

    Raises:
        Rejected: nothing was found, or hardly anything.
    """
    has_alpha = picture.mode == "RGBA"
    if has_alpha and own_alpha:
        rgb, sureness = picture.convert("RGB"), np.asarray(picture.getchannel("A"), np.float32) / 255
        agreement: float | None = 1.0
    elif has_alpha:
        padded = _padded(picture)
        rgb = flattened(padded, standing_out(padded))
        sureness = _tidied(rgb, segmenter(rgb))
        agreement = iou(sureness > 0.5, np.asarray(padded.getchannel("A")) > 127)
    else:
        rgb, agreement = picture, None
        sureness = _tidied(picture, segmenter(picture))
    inside = sureness > 0.5
    area = float(inside.mean())
    if not inside.any():
        raise Rejected("nothing was found in it")
    image = _without_rim(np.asarray(rgb.convert("RGB")), sureness)
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0).getbbox())
    if min(image.size) < _MIN_SIDE:
        raise Rejected(f"the thing is {image.width} x {image.height} pixels, less than {_MIN_SIDE} a side")
    return CutOut(image, area, agreement)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0


def _padded(picture: Image.Image) -> Image.Image:
    rim = max(4, round(_MARGIN * max(picture.size)))
    canvas = Image.new("RGBA", (picture.width + 2 * rim, picture.height + 2 * rim), (0, 0, 0, 0))
    canvas.paste(picture, (rim, rim))
    return canvas


def _tidied(rgb: Image.Image, sureness: np.ndarray) -> np.ndarray:
    return _without_false_holes(np.asarray(rgb.convert("RGB")), _without_specks(sureness))


def _without_false_holes(pixels: np.ndarray, sureness: np.ndarray) -> np.ndarray:
    """Holes through which the old background is not seen are eyes, windows, buttons: they belong to the thing."""
    cv2 = import_cv2()
    count, labels = cv2.connectedComponents((sureness <= 0.5).astype(np.uint8), connectivity=4)
    around = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    outside = np.isin(labels, around[around > 0])
    if count <= 2 or not outside.any():
        return sureness
    old = np.median(pixels[outside], axis=0)
    filled = sureness
    for label in set(range(1, count)) - set(around.tolist()):
        hole = labels == label
        if np.abs(pixels[hole] - old).sum(axis=1).mean() > _UNLIKE:
            rim = cv2.dilate(hole.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0  # soft edges lie around it
            filled = np.where(rim & (hole | (sureness > 0.5)), np.float32(1), filled)
    return filled


def _without_specks(sureness: np.ndarray) -> np.ndarray:
    """Only the parts that are not tiny beside the largest."""
    cv2 = import_cv2()
    count, labels, stats, _ = cv2.connectedComponentsWithStats((sureness > 0.5).astype(np.uint8), connectivity=8)
    if count <= 2:
        return sureness
    areas = stats[1:, cv2.CC_STAT_AREA]
    small = [i + 1 for i, area in enumerate(areas) if area < _SPECK * areas.max()]
    if not small:
        return sureness
    # With their soft rims, which lie below the threshold.
    specks = cv2.dilate(np.isin(labels, small).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    kept = ~np.isin(labels, [0, *small])
    return np.where(specks & ~kept, np.float32(0), sureness)


def _without_rim(pixels: np.ndarray, sureness: np.ndarray) -> Image.Image:
    """RGBA: at soft edges, where the old background shines through, the nearest colour from inside the thing."""
    cv2 = import_cv2()
    alpha = np.clip((sureness - 0.25) / 0.6, 0, 1)
    solid = (sureness > 0.5).astype(np.uint8)
    inner = cv2.erode(solid, np.ones((3, 3), np.uint8)) > 0
    if not inner.any():
        inner = solid > 0
    _, labels = cv2.distanceTransformWithLabels(
        (~inner).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = np.zeros((int(labels.max()) + 1, 3), np.uint8)
    colours[labels[inner]] = pixels[inner]
    filled = np.where(inner[..., None], pixels, colours[labels])
    return Image.fromarray(np.dstack([filled, np.round(alpha * 255).astype(np.uint8)]))
