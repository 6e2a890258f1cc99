"""Pictures for people: samples of the finished set, and how some of them came about."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from samtrain.core.seeds import derive_seed
from samtrain.data.index import ShardIndex
from samtrain.data.mmlink.filters import Finished
from samtrain.data.mmlink.options import OBJECTS
from samtrain.data.mmlink.pictures import flattened, from_png
from samtrain.data.mmlink.store import Store

_CELL, _GAP, _LINE, _LINES = 150, 6, 13, 6
_SAMPLES_PER_ROW = 3
_PICTURES = 3  # of a sample that are shown


def contact_sheet(folder: Path, path: Path, *, seed: int, num_samples: int = 24) -> None:
    """Samples of all splits and domains, drawn at random, with their texts."""
    chosen: list[tuple[ShardIndex, int]] = []
    indices = [ShardIndex.load(split.parent) for split in sorted(folder.glob("*/index.json"))]
    for index in indices:
        rng = np.random.default_rng(derive_seed("sheet", seed, index.folder.name))
        by_task: dict[str, list[int]] = {}
        for i, entry in enumerate(index.entries):
            by_task.setdefault(entry.task, []).append(i)
        share = num_samples * len(index) / sum(map(len, indices))
        for members in by_task.values():
            count = min(len(members), max(1, round(share * len(members) / len(index))))
            chosen += [(index, members[int(i)]) for i in rng.permutation(len(members))[:count]]
    width = _PICTURES * (_CELL + _GAP) + _GAP
    height = _CELL + _LINES * _LINE + 2 * _GAP
    rows = -(-len(chosen) // _SAMPLES_PER_ROW)
    sheet = Image.new("RGB", (_SAMPLES_PER_ROW * width, max(1, rows) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for number, (index, i) in enumerate(chosen):
        left, top = number % _SAMPLES_PER_ROW * width, number // _SAMPLES_PER_ROW * height
        record, images = index.read_sample(i)
        for column, data in enumerate(images[:_PICTURES]):
            with Image.open(io.BytesIO(data)) as opened:
                _put(sheet, opened.convert("RGB"), left + _GAP + column * (_CELL + _GAP), top + _GAP)
        lines = [record.key]
        lines += textwrap.wrap(record.instruction, 78)[:2] + textwrap.wrap(f"-> {record.output}", 78)[:3]
        for line_number, line in enumerate(lines):
            at = (left + _GAP, top + _CELL + _GAP + 2 + _LINE * line_number)
            draw.text(at, line, fill="grey" if not line_number else "black", font=font)
    sheet.save(path, "PNG", compress_level=3)
    for index in indices:
        index.close()


def stages_sheet(samples: Sequence[Finished], store: Store, path: Path, *, num_rows: int = 10) -> None:
    """Things as they were cut out, mask image (on pink), and the filled picture; a row per canvas."""
    shown = [sample for sample in samples if sample.plan.domain == OBJECTS]
    shown = sorted(shown, key=lambda sample: derive_seed("stages sheet", sample.plan.key))[: num_rows // 2]
    rows: list[list[Image.Image]] = []
    for sample in shown:
        for number, things in enumerate(sample.plan.canvases):
            cells = [flattened(from_png(store.read(thing.ref, "picture.png")), (255, 170, 220)) for thing in things[:2]]
            for ref, name in ((sample.compose_ref, f"{number}.things.png"), (sample.compose_ref, f"{number}.mask.png")):
                image = from_png(store.read(ref, name))
                cells.append(flattened(image, (255, 170, 220)))
            with Image.open(io.BytesIO(store.read(sample.fill_ref, f"{number}.jpg"))) as opened:
                cells.append(opened.convert("RGB"))
            rows.append(cells)
    columns = max((len(row) for row in rows), default=1)
    size = (columns * (_CELL + _GAP) + _GAP, max(1, len(rows)) * (_CELL + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            _put(sheet, image, _GAP + x * (_CELL + _GAP), _GAP + y * (_CELL + _GAP))
    sheet.save(path, "PNG", compress_level=3)


def _put(sheet: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """In the middle of a cell, in its own shape."""
    scale = _CELL / max(image.size)
    image = image.resize(
        (max(1, round(scale * image.width)), max(1, round(scale * image.height))), Image.Resampling.LANCZOS
    )
    sheet.paste(image, (left + (_CELL - image.width) // 2, top + (_CELL - image.height) // 2))
