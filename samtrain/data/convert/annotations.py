"""The authors' `<SET>/annotations.json`: a list of {"id", "img_list": [...], "instruction", "output"}.

Image names are relative to the set's folder. A folder of several sets becomes one split for each set. Written back,
a record that came from such a file is the record it was; any other carries its key, task, source and meta in one
more field, `samtrain`, so that it too returns as it was.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord
from samtrain.data.convert.base import (
    Draft,
    Format,
    Record,
    Source,
    check_split,
    find_sources,
    lay_out,
    list_of,
    object_of,
    set_name,
    shown,
    text_of,
)
from samtrain.data.convert.images import ImageFolder
from samtrain.data.convert.json_stream import Head, read_array
from samtrain.data.convert.options import ConvertOptions

NAME = "annotations"
FILE_NAME = "annotations.json"
CARRIED = "samtrain"  # the field with what the format has no place for
CARRIED_FIELDS = {"key": str, "task": str, "source": str, "meta": dict}


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    """The file; the file in a folder; or the files of its sub-folders, each a split."""
    if path.is_file() or (path / FILE_NAME).is_file():
        return find_sources(
            path, {"train": [FILE_NAME]}, options, task=set_name(path / FILE_NAME if path.is_dir() else path)
        )
    found = []
    for file in sorted(path.glob(f"*/{FILE_NAME}")):
        name = file.parent.name
        root = Path(options.images) / name if options.images else file.parent
        found.append(Source(file, check_split(name, where=str(file)), options.task or name, root))
    return found


def fits(head: Head) -> bool:
    return head.kind == "array" and head.has_record_with("img_list")


def records(source: Source, options: ConvertOptions) -> Iterator[Record]:
    for element in read_array(source.path):
        yield Record(element.number, f"record {element.number}", element.value, element.done, element.total)


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    given = object_of(record)
    names = list_of(given.get("img_list"), str, "img_list")
    instruction = lay_out(text_of(given.get("instruction"), "instruction"), len(names), options.layout)
    output = text_of(given.get("output"), "output")
    if CARRIED in given:
        return [Draft(instruction, output, list(names), carried=carried_of(given, FORMAT.fields))]
    written = {"instruction": instruction, "output": output, "img_list": names}
    kept = {name: value for name, value in given.items() if name not in written or written[name] != value}
    return [Draft(instruction, output, list(names), kept)]


def row(record: SampleRecord, names: list[str], number: int) -> dict[str, Any]:
    """One record of the file.

    Args:
        names: of the images, below the folder of the file.
    """
    written = {"img_list": names, "instruction": record.instruction, "output": record.output}
    kept = record.meta.get("row")
    if record.meta.get("format") != NAME or not isinstance(kept, dict):
        return {"id": number, **written, CARRIED: carried_by(record)}
    return {**({"id": kept["id"]} if "id" in kept else {}), **written, **kept}


def carried_by(record: SampleRecord) -> dict[str, Any]:
    """What a foreign format has no place for."""
    return {name: getattr(record, name) for name in CARRIED_FIELDS}


def carried_of(given: dict[str, Any], fields: frozenset[str]) -> dict[str, Any]:
    """The same, read from a record that we wrote, with these fields and no others.

    Raises:
        DataError: it was not written by us.
    """
    value = given[CARRIED]
    if given.keys() - fields:
        raise DataError(f"has `{CARRIED}` and also {', '.join(sorted(given.keys() - fields))}, which would be lost")
    if (
        not isinstance(value, dict)
        or value.keys() != CARRIED_FIELDS.keys()
        or not all(isinstance(value[name], kind) for name, kind in CARRIED_FIELDS.items())
    ):
        raise DataError(f"`{CARRIED}` is {shown(value)}, expected an object of {', '.join(CARRIED_FIELDS)}")
    return value


FORMAT = Format(
    looks_like='the authors\' annotations.json: [{"id", "img_list", "instruction", "output"}, ...]',
    sources=sources,
    fits=fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"id", "img_list", "instruction", "output", CARRIED}),
    uses=frozenset({"layout"}),
)
