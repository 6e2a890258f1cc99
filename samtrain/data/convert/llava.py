"""LLaVA's conversations, a JSON list or one object a line: {"id", "image": name or [names], "conversations":
[{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}, ...]}.

Every answer becomes a sample (see `dialogue`). Line breaks around `<image>` stay as they are.
"""

from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.data.convert.base import Draft, Format, Record, Source, find_sources, list_of, object_of, set_name, shown
from samtrain.data.convert.dialogue import ANSWER, QUESTION, SYSTEM, Turn, exchanges
from samtrain.data.convert.images import ImageFolder, inline_image, is_inline
from samtrain.data.convert.json_stream import Head
from samtrain.data.convert.messages import CANDIDATES, records
from samtrain.data.convert.options import ConvertOptions

ROLES = {"human": QUESTION, "user": QUESTION, "gpt": ANSWER, "assistant": ANSWER, "system": SYSTEM}
UNSUPPORTED = ("video", "videos", "audio", "audios")


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    name = path.absolute().name if path.is_dir() else set_name(path)
    return find_sources(path, CANDIDATES, options, task=name)


def fits(head: Head) -> bool:
    return head.kind in ("array", "lines") and head.has_record_with("conversations")


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    given = object_of(record)
    for name in UNSUPPORTED:
        if given.get(name):
            raise DataError(f"has `{name}`, which cannot be trained on")
    image = given.get("image")
    named = [] if image is None else list_of([image] if isinstance(image, str) else image, str, "image")
    parts = exchanges(_turns(given.get("conversations")), len(named), layout=options.layout)
    found: list[str | bytes] = [
        inline_image(name, max_bytes=options.max_image_bytes) if is_inline(name) else name for name in named
    ]
    row = {name: value for name, value in given.items() if name not in ("conversations", "image")}
    several = len(parts) != 1
    return [
        Draft(part.instruction, part.output, found[: part.num_images], row, part=number if several else None)
        for number, part in enumerate(parts)
    ]


def _turns(conversations: object) -> list[Turn]:
    turns = []
    for turn in list_of(conversations, dict, "conversations"):
        role, text = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise DataError(f"has a turn from {shown(role)} with the value {shown(text)}")
        turns.append(Turn(ROLES[role], text))
    return turns


FORMAT = Format(
    looks_like='LLaVA: {"id", "image", "conversations": [{"from", "value"}, ...]}, a list or one a line',
    sources=sources,
    fits=fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"id", "image", "conversations"}),
    uses=frozenset({"layout"}),
)
