"""DEMON: {"metadata": {dataset, split, task_instruction: [...]}, "data": [{sample_id, task_instruction_id,
task_instance: {context, images_path, choice_list?}, response}]}, images in `images/` beside the file.

As in the benchmark's own loader, the instruction is task_instruction[id] + context, no space added, and a choice list
is written out behind them. Markers `{image#1}` stay literal text, as the authors' model reads them (layout `prefix`),
or become placeholders (`interleaved`). Source: the public DEMON benchmark of arXiv 2308.04152.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
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
from samtrain.data.convert.json_stream import Head, read_array, read_field
from samtrain.data.convert.options import ConvertOptions

CANDIDATES = {"core": ["core.json", "core/core.json"], "full": ["full.json", "full/full.json"]}


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    return find_sources(path, CANDIDATES, options, task="")


def prepare(source: Source, options: ConvertOptions) -> Source:
    """Split, task and instructions are in the metadata."""
    metadata = read_field(source.path, "metadata")
    where = f"{source.path}: metadata"
    if not isinstance(metadata, dict):
        raise DataError(f"{where} is {shown(metadata)}, expected an object")
    return Source(
        source.path,
        split=options.split or check_split(metadata.get("split"), where=where),
        task=options.task or str(metadata.get("dataset") or set_name(source.path)),
        images=Path(options.images) if options.images else source.path.parent / "images",
        header=instructions_of(metadata, where=where),
    )


def instructions_of(metadata: dict[str, Any], *, where: str) -> list[str]:
    """The instructions that records choose from.

    Raises:
        DataError: there are none.
    """
    given = metadata.get("task_instruction")
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise DataError(f"{where}: `task_instruction` is {shown(given)}, expected a list of texts")
    return given


def fits(head: Head) -> bool:
    data = head.fields.get("data", [])
    return "metadata" in head.fields and any(isinstance(one, dict) and "task_instance" in one for one in data)


def records(source: Source, options: ConvertOptions) -> Iterator[Record]:
    for element in read_array(source.path, "data"):
        yield Record(element.number, f"record {element.number}", element.value, element.done, element.total)


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    given = object_of(record)
    instance = given.get("task_instance")
    if not isinstance(instance, dict):
        raise DataError(f"`task_instance` is {shown(instance)}, expected an object")
    which = given.get("task_instruction_id")
    if isinstance(which, bool) or not isinstance(which, int) or not 0 <= which < len(source.header):
        raise DataError(f"`task_instruction_id` is {shown(which)}, there are {len(source.header)} instructions")
    names = list_of(instance.get("images_path"), str, "images_path")
    text = source.header[which] + text_of(instance.get("context"), "context")
    if "choice_list" in instance:
        choices = [text_of(choice, "choice_list") for choice in list_of(instance["choice_list"], object, "choice_list")]
        text += "Choice list:['" + "', '".join(choices) + "']. Your answer is:"
    row = {name: value for name, value in given.items() if name not in ("task_instance", "response")}
    row |= {name: value for name, value in instance.items() if name not in ("context", "images_path")}
    return [
        Draft(lay_out(text, len(names), options.layout), text_of(given.get("response"), "response"), list(names), row)
    ]


FORMAT = Format(
    looks_like='DEMON\'s core.json: {"metadata": {...}, "data": [{"sample_id", "task_instance", "response"}, ...]}',
    sources=sources,
    prepare=prepare,
    fits=fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"sample_id", "task_instruction_id", "choice_list"}),
    uses=frozenset({"layout"}),
)
