"""A contact sheet: samples as a person sees them, pictures in a row, the text below."""

import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from samtrain.data.index import ShardIndex

_CELL, _GAP, _TEXT_HEIGHT, _COLUMNS = 160, 6, 58, 5


def contact_sheet(
    folder: Path, split: str, path: Path, *, num_samples: int = 8, start: int = 0, boxes: bool = False
) -> Path:
    """Write a PNG of `num_samples` samples of a split, from number `start` on; `boxes` outlines every object.

    Raises:
        DataError: the split is missing or damaged.
    """
    index = ShardIndex.load(Path(folder) / split)
    shown = range(start, min(start + num_samples, len(index)))
    font = ImageFont.load_default(size=12)
    width, row_height = _COLUMNS * (_CELL + _GAP) + _GAP, _CELL + _TEXT_HEIGHT
    sheet = Image.new("RGB", (width, max(1, len(shown)) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, i in enumerate(shown):
        record, images = index.read_sample(i)
        top = row * row_height + _GAP
        for column, data in enumerate(images[:_COLUMNS]):
            with Image.open(io.BytesIO(data)) as opened:
                picture = opened.convert("RGB")
            if boxes:
                pen = ImageDraw.Draw(picture)
                for item in record.meta["pictures"][column]["objects"]:
                    pen.rectangle(item["box"], outline="red")
            sheet.paste(picture.resize((_CELL, _CELL)), (_GAP + column * (_CELL + _GAP), top))
        text = f"{record.key} [{record.task}] {record.instruction}\n"
        lines = textwrap.wrap(text, 125)[:2] + textwrap.wrap(f"-> {record.output}", 125)[:1]
        for number, line in enumerate(lines):
            draw.text((_GAP, top + _CELL + 2 + 15 * number), line, fill="black", font=font)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    index.close()
    return path
