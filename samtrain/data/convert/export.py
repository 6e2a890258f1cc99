"""Shards to annotations.json or messages: one file and its images in a folder, for each split.

Images go where they were when they came, below the new folder, or to `images/<member>` where that is not possible.
Their names come from shards, which others may have written, so a name is used only if it is a plain relative path of
an image's suffix; a name taken by other bytes is not used again.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord
from samtrain.data.convert import annotations, messages
from samtrain.data.convert.images import SUFFIXES
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.report import Report
from samtrain.data.index import INDEX_FILE, SampleEntry, ShardIndex

_PART = re.compile(r"[^/\\\0]{1,255}")
_BLOCK = 512
RowOf = Callable[[SampleRecord, list[str], int], dict[str, Any]]


def split_folders(path: Path) -> dict[str, Path]:
    """Split -> folder of shards; `path` itself has the name "".

    Raises:
        DataError: there is none.
    """
    if (path / INDEX_FILE).exists():
        return {"": path}
    found = {index.parent.name: index.parent for index in sorted(path.glob(f"*/{INDEX_FILE}"))}
    if not found:
        raise DataError(f"{path}: holds no indexed shards; `samtrain data index FOLDER` indexes a folder that has tars")
    return found


def export_split(
    path: Path, folder: Path, options: ConvertOptions, report: Report, split: str, tick: Callable[[int, int], None]
) -> None:
    """Write the samples of the shards in `path` to `folder`.

    Raises:
        DataError: too many cannot be read.
    """
    index = ShardIndex.load(path)
    count = report.count(split)
    folder.mkdir(parents=True, exist_ok=True)
    is_array = options.to == "annotations"
    row_of: RowOf = annotations.row if is_array else messages.row
    name = annotations.FILE_NAME if is_array else messages.FILE_NAME
    with open(folder / name, "w", encoding="utf-8") as stream:
        stream.write("[" if is_array else "")
        for number in range(len(index)):
            if options.limit is not None and count.samples >= options.limit:
                break
            count.records += 1
            entry = index.entries[number]
            try:
                record, images = index.read_sample(number)
                names = place_images(folder, record, images, report)
                row = json.dumps(row_of(record, names, number), ensure_ascii=False)
                row.encode()
            except (DataError, UnicodeEncodeError) as error:
                report.list(split, entry.key, str(error))
                continue
            if is_array:
                stream.write(f"{',' if count.samples else ''}\n{row}")
            else:
                stream.write(f"{row}\n")
            count.converted += 1
            count.samples += 1
            count.images += len(images)
            if has_extra_members(index, entry):
                report.notes["samples with extra members (masks, ...), which this format has no place for"] += 1
            tick(number + 1, len(index))
        stream.write("\n]\n" if is_array else "")
    index.close()
    if not count.samples:
        raise DataError(f"{path}: none of its {count.records} samples could be used: {report.first[0]}")


def place_images(folder: Path, record: SampleRecord, images: list[bytes], report: Report) -> list[str]:
    """Write the images and return their names below `folder`."""
    were = record.meta.get("images")
    wanted = were if isinstance(were, list) and len(were) == len(images) else [None] * len(images)
    names = []
    for name, reference, data in zip(wanted, record.images, images):
        if name is None or not _place(folder, name, data):
            if name is not None:
                report.notes["images that could not keep their name"] += 1
            name = f"images/{reference.file}"
            if not _place(folder, name, data):
                raise DataError(f"image {name!r} cannot be written: the name is taken, or not allowed")
        names.append(name)
    return names


def _place(folder: Path, name: Any, data: bytes) -> bool:
    """Write an image, unless its name is unfit or taken by other bytes."""
    if not isinstance(name, str) or not name.lower().endswith(SUFFIXES):
        return False
    if not all(_PART.fullmatch(part) and part != ".." for part in name.removeprefix("./").split("/")):
        return False
    path = folder / name
    try:
        if path.exists():
            return path.read_bytes() == data
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):  # a name that is a folder of another
        return False
    except UnicodeEncodeError:
        return False
    return True


def has_extra_members(index: ShardIndex, entry: SampleEntry) -> bool:
    """Whether a sample has members besides its record and its images."""
    known = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for _, size in (entry.record, *entry.images))
    if entry.size == known:
        return False
    data = index.read_members(entry)
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * _BLOCK))) as tar:  # headers of other kinds are no members
        return len(tar.getnames()) > 1 + entry.num_images
