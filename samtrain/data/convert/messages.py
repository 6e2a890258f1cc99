"""OpenAI's and ms-swift's messages, a JSON list or one object a line:
{"messages": [{"role", "content"}, ...], "images": [...]}.

A content is a text, or a list of parts: {"type": "text"}, {"type": "image"}, {"type": "image_url"}. An image is a name
below the image folder, {"path": name}, or a base64 data URI; URLs are not fetched. Videos, audio, tools and grounding
boxes are refused with their reason. Every answer of a dialogue becomes a sample (see `dialogue`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER, SampleRecord
from samtrain.data.convert.annotations import CARRIED, carried_by, carried_of
from samtrain.data.convert.base import Draft, Format, Record, Source, find_sources, list_of, object_of, set_name, shown
from samtrain.data.convert.dialogue import ANSWER, QUESTION, SYSTEM, Turn, exchanges
from samtrain.data.convert.images import ImageFolder, inline_image, is_inline
from samtrain.data.convert.json_stream import Head, read_records
from samtrain.data.convert.options import ConvertOptions

NAME = "messages"
FILE_NAME = "messages.jsonl"
UNSUPPORTED = ("videos", "audios", "tools", "objects")
CANDIDATES = {
    "train": ["train.jsonl", "train.json", FILE_NAME, "messages.json"],
    "validation": ["validation.jsonl", "validation.json", "val.jsonl", "val.json"],
    "test": ["test.jsonl", "test.json"],
}


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    name = path.absolute().name if path.is_dir() else set_name(path)
    return find_sources(path, CANDIDATES, options, task=name)


def fits(head: Head) -> bool:
    return head.kind in ("array", "lines") and head.has_record_with("messages")


def records(source: Source, options: ConvertOptions) -> Iterator[Record]:
    for element in read_records(source.path):
        where = f"record {element.number}" if element.problem is None else f"line {element.number + 1}"
        yield Record(element.number, where, element.value, element.done, element.total, element.problem)


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    given = object_of(record)
    for name in UNSUPPORTED:
        if given.get(name):
            raise DataError(f"has `{name}`, which cannot be trained on")
    messages = list_of(given.get("messages"), dict, "messages")
    turns, in_parts = _turns(messages)
    listed = given.get("images") or []
    if in_parts and listed:
        raise DataError("has images in `images` and in its messages; which is which?")
    named = [_image(one) for one in list_of(in_parts or listed, object, "images")]
    is_inlined = any(is_inline(name) for name in named)
    found: list[str | bytes] = [
        inline_image(name, max_bytes=options.max_image_bytes) if is_inline(name) else name for name in named
    ]
    parts = exchanges(turns, len(found), layout=options.layout)
    if CARRIED in given:
        if len(parts) != 1:
            raise DataError(f"has `{CARRIED}` and {len(parts)} answers; it was one sample")
        return [Draft(parts[0].instruction, parts[0].output, found, carried=carried_of(given, FORMAT.fields))]
    row = {name: value for name, value in given.items() if name not in ("messages", "images")}
    several = len(parts) != 1
    if not several and not is_inlined:
        row |= {"images": given["images"]} if "images" in given and given["images"] != (named or None) else {}
        row |= {} if messages == _messages(parts[0].instruction, parts[0].output) else {"messages": messages}
    return [
        Draft(part.instruction, part.output, found[: part.num_images], row, part=number if several else None)
        for number, part in enumerate(parts)
    ]


def row(record: SampleRecord, names: list[str], number: int) -> dict[str, Any]:
    """One line of the file.

    Args:
        names: of the images, below the folder of the file.
    """
    messages, kept = _messages(record.instruction, record.output), record.meta.get("row")
    if record.meta.get("format") != NAME or not isinstance(kept, dict) or "part" in record.meta:
        return {"messages": messages, "images": names, CARRIED: carried_by(record)}
    if names != record.meta.get("images", []):  # what was kept names images that are called otherwise here
        kept = {name: value for name, value in kept.items() if name != "images"}
        if _has_parts(kept):
            del kept["messages"]
    images = {"images": names} if names and not _has_parts(kept) else {}
    return {"messages": messages, **images, **kept}


def _messages(instruction: str, output: str) -> list[dict[str, str]]:
    return [{"role": QUESTION, "content": instruction}, {"role": ANSWER, "content": output}]


def _turns(messages: list[dict[str, Any]]) -> tuple[list[Turn], list[Any]]:
    """What was said, and the images that stood in it."""
    turns, images = [], []
    for message in messages:
        role = message.get("role")
        if role not in (QUESTION, ANSWER, SYSTEM):
            raise DataError(f"has a message of role {shown(role)}, which cannot be trained on")
        others = sorted(
            name for name, value in message.items() if name not in ("role", "content", "loss", "weight") and value
        )
        if others:
            raise DataError(f"has a message with {', '.join(others)}, which cannot be trained on")
        text, found = _content(message.get("content"))
        images += found
        turns.append(Turn(role, text, is_trained=bool(message.get("loss", True)) and bool(message.get("weight", True))))
    return turns, images


def _content(content: Any) -> tuple[str, list[Any]]:
    """The text of a message, with placeholders for its images, and the images."""
    if isinstance(content, str):
        return content, []
    texts, images = [], []
    for part in list_of(content, dict, "content"):
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_PLACEHOLDER)
            image = part.get(kind)
            if kind == "image_url" and isinstance(image, dict):
                image = image.get("url")
            if image is not None:  # `{"type": "image"}` alone stands for the next of `images`
                images.append(image)
        else:
            raise DataError(f"has a part of type {shown(kind)} in a message, which cannot be trained on")
    return "".join(texts), images


def _image(value: Any) -> str:
    """The name of an image, or its data URI."""
    name = _name_of(value)
    if name is None:
        raise DataError(f"`images` holds {shown(value)}, expected a file's name")
    return name


def _name_of(value: Any) -> str | None:
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path")
    return value if isinstance(value, str) else None


def _has_parts(row: dict[str, Any]) -> bool:
    """Whether the images stand in the messages themselves."""
    messages = row.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, dict) and isinstance(message.get("content"), list) for message in messages
    )


FORMAT = Format(
    looks_like='messages: {"messages": [{"role", "content"}, ...], "images": [...]}, a list or one a line',
    sources=sources,
    fits=fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"messages", "images", *UNSUPPORTED, CARRIED}),
    uses=frozenset({"layout"}),
)
