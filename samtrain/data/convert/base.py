"""What a format is: where its files lie, how to recognise them, and how one of its records becomes a sample.

A `Format` is a few functions. `sources` finds the files of each split; `fits` recognises them by their first records;
`prepare` reads what all records share; `records` reads one record after another (streaming); `drafts` turns a record
into samples, or raises DataError with the reason why it cannot. Nothing here opens an image: a draft names images,
`ImageFolder` reads them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER
from samtrain.data.convert.images import ImageFolder
from samtrain.data.convert.json_stream import Head
from samtrain.data.convert.options import ConvertOptions

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
MARKER = re.compile(r"\{(?:image|table)#(\d+)\}")  # DEMON's: the literal text stands where an image belongs
_SPLIT = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class Source:
    """The records of one split.

    path: a file (or folder) of records. images: the folder that image names are relative to.
    header: what all records share, e.g. DEMON's metadata.
    """

    path: Path
    split: str
    task: str
    images: Path
    header: Any = None


@dataclass(frozen=True)
class Record:
    """One record as it was read.

    number: its place in the source. where: how a reader finds it. done, total: progress through the source.
    problem: why it could not even be read.
    """

    number: int
    where: str
    value: Any
    done: int
    total: int
    problem: str | None = None


@dataclass(frozen=True)
class Draft:
    """A sample before its images are read.

    images: names below the image folder, or the bytes of images that stood in the record itself.
    row: the record's fields that are not in the sample; kept in `meta`, so that nothing is lost.
    task: its own, where a source has several. part: distinguishes several samples of one record.
    carried: key, task, source and meta of a sample that was one of ours before.
    """

    instruction: str
    output: str
    images: list[str | bytes]
    row: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    part: int | None = None
    carried: dict[str, Any] | None = None


def as_found(source: Source, options: ConvertOptions) -> Source:
    """The `prepare` of formats whose records stand alone."""
    return source


@dataclass(frozen=True)
class Format:
    """A foreign format.

    looks_like: one line for people. fields: those a record may have; others are kept, and counted.
    uses: the options that mean something to it, besides those that all share.
    """

    looks_like: str
    sources: Callable[[Path, ConvertOptions], list[Source]]
    fits: Callable[[Head], bool]
    records: Callable[[Source, ConvertOptions], Iterator[Record]]
    drafts: Callable[[Record, Source, ConvertOptions, ImageFolder], list[Draft]]
    prepare: Callable[[Source, ConvertOptions], Source] = as_found
    fields: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()


def find_sources(
    path: Path, candidates: dict[str, list[str]], options: ConvertOptions, *, task: str, images: Path | None = None
) -> list[Source]:
    """Sources of a file, or of a folder with one file for each split.

    Args:
        candidates: split -> names below `path`; the first that exists is taken.
        images: the image folder, unless the options name one; default: `path`, or the folder of the file.
    """
    root = Path(options.images) if options.images else images or (path if path.is_dir() else path.parent)
    task = options.task or task
    if path.is_file():
        return [Source(path, options.split or split_of(path.name) or "train", task, root)]
    found = []
    for split, names in candidates.items():
        path_of_split = next((path / name for name in names if (path / name).is_file()), None)
        if path_of_split is not None:
            found.append(Source(path_of_split, split, task, root))
    if options.split and len(found) == 1:
        found = [Source(found[0].path, options.split, task, root)]
    return found


def split_of(name: str) -> str | None:
    """The split a file name speaks of: `val.story-in-sequence.json`, `SSID_Train.json`, `train.jsonl`."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_NAMES]
    return SPLIT_NAMES[words[0]] if words else None


def set_name(path: Path) -> str:
    """What a set is called: its file's name, or its folder's where the file is called after a split or a format."""
    path = path.absolute()
    stem = path.name.split(".")[0]
    is_common = stem.lower() in {*SPLIT_NAMES, "annotations", "core", "full", "messages", "data"}
    return path.parent.name or stem if is_common else stem


def check_split(name: Any, *, where: str) -> str:
    """A split's name becomes a folder's.

    Raises:
        DataError: it could not.
    """
    if not isinstance(name, str) or not _SPLIT.fullmatch(name):
        raise DataError(f"{where}: split {name!r} cannot be a folder's name; --split gives another")
    return name


def object_of(record: Record) -> dict[str, Any]:
    """The record as a JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(record.value, dict):
        raise DataError(f"is {shown(record.value)}, expected an object")
    return record.value


def text_of(value: Any, name: str) -> str:
    """A text; numbers as text, as the authors' loaders read them.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"`{name}` is {shown(value)}, expected text")
    return value if isinstance(value, str) else str(value)


def list_of(value: Any, kind: type, name: str) -> list[Any]:
    """A list whose elements are all of one type.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise DataError(f"`{name}` is {shown(value)}, expected a list of {kind.__name__}")
    return value


def shown(value: Any) -> str:
    """A value in an error message: short, whatever it is."""
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def lay_out(instruction: str, num_images: int, layout: str) -> str:
    """The instruction in the wanted layout.

    `prefix` leaves it as it is (the authors' models read `{image#1}` as text). `interleaved` wants one `<image>` for
    each image: markers become placeholders; where the text has neither, the placeholders stand in front.

    Raises:
        DataError: markers or placeholders do not agree with the images.
    """
    placeholders = instruction.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, num_images):
        raise DataError(f"has {placeholders} {IMAGE_PLACEHOLDER} placeholders but {num_images} images")
    if layout == "prefix" or placeholders:
        return instruction
    markers = [int(number) for number in MARKER.findall(instruction)]
    if not markers:
        return IMAGE_PLACEHOLDER * num_images + instruction
    if markers != list(range(1, num_images + 1)):
        raise DataError(f"its markers name images {markers}, but it has {num_images}: each must stand once, in order")
    return MARKER.sub(IMAGE_PLACEHOLDER, instruction)
