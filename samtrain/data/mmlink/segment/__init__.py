"""Segmentation: which pixels of a picture are the thing. One protocol, several ways, one cut-out."""

from typing import Any, Protocol

import numpy as np
from PIL import Image

from samtrain.data.mmlink.options import Choice


class Segmenter(Protocol):
    """How sure it is of each pixel."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> [H, W] float32 in 0..1: 1 where the thing is."""
        ...


def build_segmenter(choice: Choice) -> Segmenter:
    """Loads the model.

    Raises:
        ConfigError: a model or its library is not there.
    """
    options: Any = choice.options
    if choice.kind == "u2net":
        from samtrain.data.mmlink.segment.u2net import U2netSegmenter

        return U2netSegmenter(options)
    if choice.kind == "sam":
        from samtrain.data.mmlink.segment.sam import SamSegmenter

        return SamSegmenter(options)
    from samtrain.data.mmlink.segment.classical import GrabCutSegmenter

    return GrabCutSegmenter(options) if choice.kind == "grabcut" else GrabCutSegmenter()
