"""Samples as a person sees them: the images in order, instruction and answer beneath, whole and wrapped.

A picture that cannot be decoded is drawn as its error. Characters the font lacks are written as their code points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from samtrain.core.errors import DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER, SampleRecord
from samtrain.data.decode import decode_image
from samtrain.data.index import ShardIndex

COLUMNS = 5  # images beside each other
_CELL, _GAP, _PAD, _SIZE = 190, 6, 10, 13  # pixels; _SIZE of the letters
_MAX_LINES = 30  # of one text
_MAX_IMAGES = 50  # of one sample
_MAX_PIXELS = 64_000_000
_INK, _GREY, _BLUE, _RED = "#111111", "#777777", "#0b4f9e", "#b00020"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class ShownSample:
    """One row of a sheet. label: where it is from. boxes: of each image, (left, top, right, bottom) in pixels."""

    record: SampleRecord
    images: Sequence[bytes]
    label: str = ""
    boxes: Sequence[Sequence[Sequence[float]]] = ()


def draw_samples(samples: Sequence[ShownSample], *, columns: int = COLUMNS) -> Image.Image:
    """The sheet: one block for each sample, as high as its images and texts need."""
    most = max((min(len(sample.images), columns) for sample in samples), default=1)
    width = 2 * _PAD + max(3, most) * (_CELL + _GAP) - _GAP  # three columns at least, for the texts
    blocks = [_Block(sample, width, columns=max(1, most)).draw() for sample in samples]
    sheet = Image.new("RGB", (width, max(1, sum(block.height for block in blocks))), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def read_sample(index: ShardIndex, i: int, *, boxes: bool = False) -> ShownSample:
    """Sample `i` with whatever bytes its images have.

    Args:
        boxes: outline the objects that `meta.pictures` lists, as mmlink-mini has them.

    Raises:
        DataError: the record cannot be read, or the shard is cut off.
    """
    record = index.read_record(i)
    images = index.read_images(i, record, verify=False)
    label = f"{index.folder.name}/{index.shards[index.entries[i].shard]}"
    return ShownSample(record, images, label, _boxes(record.meta) if boxes else ())


def contact_sheet(
    folder: Path, split: str, path: Path, *, num_samples: int = 8, start: int = 0, boxes: bool = False
) -> Path:
    """Write a PNG of `num_samples` samples of a split, from number `start` on; `boxes` outlines every object.

    Raises:
        DataError: the split is missing or damaged.
    """
    index = ShardIndex.load(Path(folder) / split)
    shown = range(start, min(start + num_samples, len(index)))
    sheet = draw_samples([read_sample(index, i, boxes=boxes) for i in shown])
    index.close()
    return save_sheet(sheet, path)


def save_sheet(sheet: Image.Image, path: str | Path) -> Path:
    """Write the sheet as PNG, and the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


class _Block:
    """A sample's part of the sheet: lines and cells are placed first, then drawn."""

    def __init__(self, sample: ShownSample, width: int, *, columns: int) -> None:
        self.sample = sample
        self.width = width
        self.columns = columns
        self.images = list(sample.images[:_MAX_IMAGES])

    def draw(self) -> Image.Image:
        texts = self._texts()
        rows = -(-len(self.images) // self.columns)
        line = _SIZE + 4
        height = 2 * _PAD + line + rows * (_CELL + _GAP) + line * sum(len(lines) for _, lines in texts) + _GAP
        block = Image.new("RGB", (self.width, height), "white")
        draw = ImageDraw.Draw(block)
        draw.line([(0, 0), (self.width, 0)], fill="#cccccc")
        draw.text((_PAD, _PAD), self._headline(), fill=_GREY, font=font())
        top = _PAD + line
        for number, data in enumerate(self.images):
            row, column = divmod(number, self.columns)
            at = (_PAD + column * (_CELL + _GAP), top + row * (_CELL + _GAP))
            self._cell(block, draw, at, number, data)
        top += rows * (_CELL + _GAP)
        for colour, lines in texts:
            for text in lines:
                draw.text((_PAD, top), text, fill=colour, font=font())
                top += line
        return block

    def _headline(self) -> str:
        record, count = self.sample.record, len(self.sample.images)
        more = f", the first {_MAX_IMAGES} shown" if count > _MAX_IMAGES else ""
        parts = [record.key, self.sample.label, record.task, f"{count} image{'s' * (count != 1)}{more}", record.source]
        return wrap("   ·   ".join(part for part in parts if part), self.width - 2 * _PAD)[0]

    def _texts(self) -> list[tuple[str, list[str]]]:
        record, width = self.sample.record, self.width - 2 * _PAD
        instruction = record.instruction
        for number in range(1, instruction.count(IMAGE_PLACEHOLDER) + 1):
            instruction = instruction.replace(IMAGE_PLACEHOLDER, f"[image {number}]", 1)
        return [(_INK, wrap(instruction, width)), (_BLUE, wrap(f"→ {record.output}", width))]

    def _cell(
        self, block: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], number: int, data: bytes
    ) -> None:
        """One image in the middle of its cell, in its own shape, with its number."""
        left, top = at
        draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), fill="#f1f1f1")
        try:
            image = decode_image(data, max_pixels=_MAX_PIXELS, where=f"image {number + 1}")
        except DataError as error:
            draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), outline=_RED, width=2)
            for i, line in enumerate(wrap(str(error), _CELL - 16)[:9]):
                draw.text((left + 8, top + 24 + i * (_SIZE + 4)), line, fill=_RED, font=font())
        else:
            scale = _CELL / max(image.size)
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            corner = (left + (_CELL - size[0]) // 2, top + (_CELL - size[1]) // 2)
            block.paste(image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC), corner)
            if number < len(self.sample.boxes):
                for box in self.sample.boxes[number]:
                    places = [corner[i % 2] + scale * value for i, value in enumerate(box)]
                    draw.rectangle((places[0], places[1], places[2], places[3]), outline="red")
        draw.rectangle((left, top, left + 9 + 8 * len(str(number + 1)), top + _SIZE + 5), fill="black")
        draw.text((left + 5, top + 2), str(number + 1), fill="white", font=font())


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces where it can be; too many lines are told, not
    drawn."""
    lines: list[str] = []
    for paragraph in _legible(text).split("\n"):
        left = paragraph
        while left and len(lines) <= _MAX_LINES:
            cut = _cut(left, width)
            lines.append(left[:cut])
            left = left[cut:].lstrip(" ")
        if not paragraph:
            lines.append("")
        if len(lines) > _MAX_LINES:
            shown = lines[:_MAX_LINES]
            return [*shown, f"… ({max(1, len(text) - sum(map(len, shown)))} characters more)"]
    return lines


def _cut(line: str, width: int) -> int:
    """How many characters of `line` go into one line: up to the last space that fits, or as many as fit."""
    low, high = 1, min(len(line), width)  # no letter is narrower than a pixel
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font().getlength(line[:middle]) <= width else (low, middle - 1)
    if low == len(line):
        return low
    space = line.rfind(" ", 1, low + 1)
    return space if space > 0 else low


def _legible(text: str) -> str:
    """Without controls; characters the font lacks as their code points."""
    known = _characters()
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(
        char if char == "\n" or known is None or ord(char) in known else f"\\u{ord(char):04x}" for char in text
    )


@lru_cache(maxsize=1)
def font() -> Font:
    """DejaVu Sans, which matplotlib brings (Latin, Greek, Cyrillic, symbols)."""
    return ImageFont.truetype(str(_font_path()), size=_SIZE)


@lru_cache(maxsize=1)
def _characters() -> Any:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_path())).get_charmap())


def _font_path() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _boxes(meta: dict[str, Any]) -> list[list[list[float]]]:
    """Of sets that list the objects of each picture; others have none."""
    try:
        return [[[float(v) for v in item["box"][:4]] for item in picture["objects"]] for picture in meta["pictures"]]
    except (KeyError, TypeError, ValueError):
        return []
