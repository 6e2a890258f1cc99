"""Pictures for people: samples of the finished set, and how some of them came about."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from samtrain.core.seeds import derive_seed
from samtrain.data.index import ShardIndex
from samtrain.data.mmlink.filters import Finished
from samtrain.data.mmlink.options import OBJECTS
from samtrain.data.mmlink.pictures import flattened, from_png
from samtrain.data.mmlink.store import Store
from samtrain.data.sheet import ShownSample, draw_samples, read_sample, save_sheet

_CELL, _GAP = 150, 6  # pixels, of the sheet of stages
_ACROSS = 3  # samples beside each other


def contact_sheet(folder: Path, path: Path, *, seed: int, num_samples: int = 24) -> None:
    """Samples of all splits and domains, drawn at random, with their texts."""
    chosen: list[ShownSample] = []
    indices = [ShardIndex.load(split.parent) for split in sorted(folder.glob("*/index.json"))]
    for index in indices:
        rng = np.random.default_rng(derive_seed("sheet", seed, index.folder.name))
        by_task: dict[str, list[int]] = {}
        for i, entry in enumerate(index.entries):
            by_task.setdefault(entry.task, []).append(i)
        share = num_samples * len(index) / sum(map(len, indices))
        for members in by_task.values():
            count = min(len(members), max(1, round(share * len(members) / len(index))))
            chosen += [read_sample(index, members[int(i)]) for i in rng.permutation(len(members))[:count]]
        index.close()
    parts = [draw_samples(chosen[i::_ACROSS], columns=3) for i in range(min(_ACROSS, len(chosen)))]
    sheet = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width
    save_sheet(sheet, path)


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
