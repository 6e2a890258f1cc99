"""Generations as a table that shows their images: one strip of thumbnails a row, left to right in their order.

MLflow shows a picture in a table where a column holds one image in every row; a strip does that for any number of
images, and none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samtrain.tracking.protocol import Example
from samtrain.tracking.spool import Spool

if TYPE_CHECKING:
    from PIL import Image

_HEIGHT, _GAP = 160, 4  # pixels
IMAGE_COLUMN = "images"


def example_columns(examples: Sequence[Example], *, spool: Spool) -> dict[str, list[str]]:
    """Column name -> values; the strips are written into the spool and stand there by their stored path."""
    columns: dict[str, list[str]] = {"key": [], IMAGE_COLUMN: [], "instruction": [], "prediction": [], "reference": []}
    for example in examples:
        path = spool.new_file("images.png")
        strip(example.images).save(path)
        columns[IMAGE_COLUMN].append(spool.stored_path(path))
        for name in ("key", "instruction", "prediction", "reference"):
            columns[name].append(getattr(example, name))
    return columns


def load_columns(columns: dict[str, list[str]], *, spool: Spool) -> dict[str, list[Any]]:
    """The columns with the strips as pictures."""
    from PIL import Image

    pictures = []
    for stored in columns[IMAGE_COLUMN]:
        with Image.open(spool.real_path(stored)) as image:
            pictures.append(image.copy())
    return {**columns, IMAGE_COLUMN: pictures}


def strip(images: "Sequence[Image.Image | Path]") -> "Image.Image":
    """Thumbnails of equal height beside each other on white; a grey square where there is no image."""
    from PIL import Image

    thumbnails = [_thumbnail(image) for image in images] or [Image.new("RGB", (_HEIGHT, _HEIGHT), "lightgrey")]
    width = sum(image.width for image in thumbnails) + _GAP * (len(thumbnails) - 1)
    canvas, left = Image.new("RGB", (width, _HEIGHT), "white"), 0
    for image in thumbnails:
        canvas.paste(image, (left, 0))
        left += image.width + _GAP
    return canvas


def _thumbnail(image: "Image.Image | Path") -> "Image.Image":
    from PIL import Image

    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return _thumbnail(opened.convert("RGB"))
    width = max(1, round(image.width * _HEIGHT / image.height))
    return image.convert("RGB").resize((width, _HEIGHT))
