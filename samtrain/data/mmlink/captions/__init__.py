"""Captions of source pictures of A."""

from typing import Any, Protocol

from PIL import Image

from samtrain.data.mmlink.options import Choice


class Captioner(Protocol):
    """Says what a picture shows."""

    def __call__(self, image: Image.Image, *, name: str, caption: str) -> str:
        """RGB picture, and what its source says of it -> a caption."""
        ...


class LabelCaptioner:
    """The source's own words."""

    def __call__(self, image: Image.Image, *, name: str, caption: str) -> str:
        return caption or name


def build_captioner(choice: Choice) -> Captioner:
    """Loads the model.

    Raises:
        ConfigError: the model is not there.
    """
    options: Any = choice.options
    if choice.kind == "instructblip":
        from samtrain.data.mmlink.captions.instructblip import InstructBlipCaptioner

        return InstructBlipCaptioner(options)
    return LabelCaptioner()
