"""SSID: `SSID_{Train,Validation,Test}.json`, {"annotations": [[{storytext, youtube_image_id, story_id, image_order,
album_id, storylet_id}], ...]}, pictures `SSID_Images/<youtube_image_id>.jpg`; five pictures a story.
"""

from collections.abc import Iterator
from pathlib import Path

from samtrain.data.convert.base import Draft, Format, Record, Source, find_sources
from samtrain.data.convert.images import ImageFolder
from samtrain.data.convert.json_stream import read_array
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.stories import Gathering, prepare

TASK = "SSID"
CANDIDATES = {
    split: [f"{folder}SSID_{name}.json" for folder in ("", "SSID_Annotations/")]
    for split, name in {"train": "Train", "validation": "Validation", "test": "Test"}.items()
}
GATHERING = Gathering(text="storytext", image="youtube_image_id", order="image_order", firsts=(1, 0))


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    images = path.parent.parent if path.is_file() and path.parent.name == "SSID_Annotations" else None
    return find_sources(path, CANDIDATES, options, task=TASK, images=images)


def records(source: Source, options: ConvertOptions) -> Iterator[Record]:
    return GATHERING.stories(read_array(source.path, "annotations"))


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    return [GATHERING.draft(record, source, options, images, ("SSID_Images", "images", "."))]


FORMAT = Format(
    looks_like='SSID: SSID_<Split>.json, {"annotations": [[{"story_id", "youtube_image_id", "storytext", ...}]]}',
    sources=sources,
    prepare=prepare,
    fits=GATHERING.fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"story_id", "album_id"}),
    uses=frozenset({"layout", "instructions"}),
)
