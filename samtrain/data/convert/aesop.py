"""Raw AESOP: `data/{train,test}.json`, a list of {storyid, theme, title, split, text[3], bg[3], image_path[3], ...}.

`image_path` ("./data/images/0035/panel_0.png") is relative to the folder that holds `data/`. `image_data`, the
parameters each picture was drawn from, is left out.
"""

from collections.abc import Iterator
from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.data.convert.base import Draft, Format, Record, Source, find_sources, list_of, object_of, shown
from samtrain.data.convert.images import ImageFolder
from samtrain.data.convert.json_stream import Head, read_array
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.stories import choose, prepare, story_draft

TASK = "AESOP"
PANELS = 3
CANDIDATES = {split: [f"data/{split}.json", f"{split}.json"] for split in ("train", "test")}
LEFT_OUT = {"text", "image_path", "image_data"}


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    folder = (path.parent if path.is_file() else path).absolute()
    images = folder.parent if folder.name == "data" else folder
    return find_sources(path, CANDIDATES, options, task=TASK, images=images)


def fits(head: Head) -> bool:
    return head.kind == "array" and head.has_record_with("storyid", "image_path")


def records(source: Source, options: ConvertOptions) -> Iterator[Record]:
    for element in read_array(source.path):
        where = f"record {element.number}"
        if isinstance(element.value, dict) and isinstance(element.value.get("storyid"), (str, int)):
            where = f"story {element.value['storyid']}"
        yield Record(element.number, where, element.value, element.done, element.total)


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    given = object_of(record)
    texts, names = list_of(given.get("text"), str, "text"), list_of(given.get("image_path"), str, "image_path")
    if len(texts) != PANELS or len(names) != PANELS:
        raise DataError(f"has {len(texts)} texts and {len(names)} images, expected {PANELS} of each")
    story = given.get("storyid")
    if isinstance(story, bool) or not isinstance(story, (str, int)):
        raise DataError(f"`storyid` is {shown(story)}")
    row = {name: value for name, value in given.items() if name not in LEFT_OUT}
    return [story_draft(texts, names, choose(source.header, options, story), row, options)]


FORMAT = Format(
    looks_like='raw AESOP: data/<split>.json, [{"storyid", "text": [3], "image_path": [3], ...}, ...]',
    sources=sources,
    prepare=prepare,
    fits=fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"storyid", "theme", "title", "split", "bg", "scenetype"}),
    uses=frozenset({"layout", "instructions"}),
)
