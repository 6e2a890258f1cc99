"""Background filling: what is behind the things of a mask image. One protocol, several ways."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from samtrain.data.mmlink.options import Choice

NEEDS_PLATES = ("photographs", "telea", "patchmatch")


@dataclass(frozen=True)
class Background:
    """What is known of the background wanted. plate: the photograph that fits the description, where one is needed."""

    description: str
    plate: Image.Image | None = None
    held_out: bool = False  # of a test split: generated ones take other colours


class Filler(Protocol):
    """Fills what is transparent. The things' opaque pixels stay."""

    def __call__(self, things: Image.Image, background: Background, rng: np.random.Generator) -> Image.Image:
        """[S, S] RGBA things -> [S, S] RGB picture."""
        ...


def build_filler(choice: Choice) -> Filler:
    """Loads the model.

    Raises:
        ConfigError: a model or its library is not there.
    """
    options: Any = choice.options
    if choice.kind == "diffusers":
        from samtrain.data.mmlink.fill.diffusion import DiffusersFiller

        return DiffusersFiller(options)
    if choice.kind == "generated":
        from samtrain.data.mmlink.fill.plain import GeneratedFiller

        return GeneratedFiller()
    from samtrain.data.mmlink.fill.photographs import InpaintFiller, PhotographFiller

    if choice.kind == "photographs":
        return PhotographFiller(options)
    return InpaintFiller(options, method=choice.kind)
