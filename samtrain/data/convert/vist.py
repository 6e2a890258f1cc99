"""Raw VIST: `sis/{train,val,test}.story-in-sequence.json`, {"images", "albums", "annotations": [[{original_text,
photo_flickr_id, story_id, worker_arranged_photo_order, album_id, ...}], ...]}; five pictures a story.

Texts are `original_text`, as DEMON's are. Pictures are looked for by id in `images/<split>`, `<split>` and `images`;
those that Flickr has lost make their stories be listed.
"""

from collections.abc import Iterator
from pathlib import Path

from samtrain.data.convert.base import Draft, Format, Record, Source, find_sources
from samtrain.data.convert.images import ImageFolder
from samtrain.data.convert.json_stream import read_array
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.stories import Gathering, prepare

TASK = "VIST"
_NAMES = {"train": "train", "validation": "val", "test": "test"}
CANDIDATES = {
    split: [f"{folder}{name}.story-in-sequence.json" for folder in ("sis/", "")] for split, name in _NAMES.items()
}
GATHERING = Gathering(text="original_text", image="photo_flickr_id", order="worker_arranged_photo_order", firsts=(0,))


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    images = path.parent.parent if path.is_file() and path.parent.name == "sis" else None
    return find_sources(path, CANDIDATES, options, task=TASK, images=images)


def records(source: Source, options: ConvertOptions) -> Iterator[Record]:
    return GATHERING.stories(read_array(source.path, "annotations"))


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    name = _NAMES.get(source.split, source.split)
    return [GATHERING.draft(record, source, options, images, (f"images/{name}", name, "images", "."))]


FORMAT = Format(
    looks_like='raw VIST: sis/<split>.story-in-sequence.json, {"annotations": [[{"photo_flickr_id", ...}]]}',
    sources=sources,
    prepare=prepare,
    fits=GATHERING.fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"story_id", "album_id"}),
    uses=frozenset({"layout", "instructions"}),
)
