"""Sources list what they have; hostile or broken entries are named, and nothing outside a folder is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data.mmlink.options import SOURCES, Choice
from samtrain.data.mmlink.sources import collect
from samtrain.data.mmlink.sources.covers import HEIGHT, WIDTH, draw_cover
from samtrain.data.mmlink.sources.listing import Listing


def listing(kind: str, **options: Any) -> Listing:
    choice = Choice(kind, SOURCES[kind].model_validate(options))
    return collect((choice,), cache=Path("nowhere"), progress=lambda what, done, total: None)[0]


def test_folders_are_things_and_files_their_poses(sources: Path) -> None:
    found = listing("folder", path=str(sources / "things"), category="shape")
    ball = [picture for picture in found.pictures if picture.identity == "things/ball"]
    assert [picture.pose for picture in ball] == ["0", "1", "2", "broken"]
    assert {picture.name for picture in ball} == {"a ball"} and ball[0].category == "shape"
    backgrounds = listing("folder", path=str(sources / "photographs"), role="background")
    assert {picture.name for picture in backgrounds.pictures} == {"green hills", "grey rocks", "blue lake", "dry field"}


def test_metadata_says_more_and_wrong_lines_are_listed(tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    Image.new("RGB", (9, 9)).save(outside)
    root = tmp_path / "own"
    root.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(outside, root / name)
    (root / "link.png").symlink_to(outside)
    rows: list[Any] = [
        {
            "file": "a.png",
            "identity": "sofa",
            "name": "a gray sofa",
            "pose": "front",
            "caption": "A sofa.",
            "mirror": False,
        },
        {"file": "../secret.png"},
        {"file": str(outside)},
        {"file": "link.png"},
        {"file": "none.png"},
        {"file": "b.png", "nmae": "x"},
        {"file": "b.png", "plural": "yes"},
        {"file": "a.png"},
        ["b.png"],
    ]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{no json\n")
    found = listing("folder", path=str(root))
    assert [picture.id for picture in found.pictures] == ["own/a.png"]
    picture = found.pictures[0]
    assert (picture.identity, picture.name, picture.pose, picture.caption) == (
        "own/sofa",
        "a gray sofa",
        "front",
        "A sofa.",
    )
    assert picture.facts == {"mirror": False}
    reasons = found.skipped
    assert reasons["../secret.png"] == reasons[str(outside)] == reasons["link.png"] == "leads out of the folder"
    assert reasons["none.png"] == "no such file"
    assert "unknown key 'nmae'" in reasons["metadata.jsonl:6"] and "plural is not true" in reasons["metadata.jsonl:7"]
    assert "a line already" in reasons["metadata.jsonl:8"] and len(reasons) == 9


def test_links_out_of_a_folder_are_not_found(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (9, 9)).save(outside / "x.png")
    root = tmp_path / "own" / "thing"
    root.mkdir(parents=True)
    (root / "x.png").symlink_to(outside / "x.png")
    with pytest.raises(DataError, match="has no usable picture"):
        listing("folder", path=str(tmp_path / "own"))


def test_covers_need_an_author_or_a_genre(sources: Path, tmp_path: Path) -> None:
    found = listing("folder", path=str(sources / "covers"), role="cover")
    assert len(found.pictures) == 12 and len({picture.identity for picture in found.pictures}) == 4
    with pytest.raises(DataError, match="a cover needs its author or genre"):
        listing("folder", path=str(sources / "icons"), role="cover")


def test_missing_sources_are_noted_or_refused(tmp_path: Path) -> None:
    assert "is not there" in listing("stamps").note or listing("stamps").pictures
    for kind in ("sprites", "stamps"):
        with pytest.raises(DataError, match=r"sources\[0\]\.path"):
            listing(kind, path=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"sources\[0\].path: .* is no folder"):
        listing("folder", path=str(tmp_path / "none"))
    with pytest.raises(DataError, match="no photographs"):
        listing("photographs", paths=[str(tmp_path)])


def test_one_folder_twice_is_an_error(sources: Path) -> None:
    choice = Choice("folder", SOURCES["folder"].model_validate({"path": str(sources / "icons"), "role": "icon"}))
    with pytest.raises(DataError, match=r"is in sources\[0\] too"):
        collect((choice, choice), cache=Path("nowhere"), progress=lambda what, done, total: None)


def test_stamps_are_named_by_their_sentence(tmp_path: Path, thing: Callable[..., Image.Image]) -> None:
    folder = tmp_path / "animals"
    (tmp_path / "symbols").mkdir()
    folder.mkdir()
    for name, sentence in {"kangaroo": "A red kangaroo.", "z": "The letter z.", "none": None}.items():
        thing(1, 0).save(folder / f"{name}.png")
        if sentence:
            (folder / f"{name}.txt").write_text(f"{sentence}\nde.utf8=Ein Känguru\n")
    thing(1, 0).save(tmp_path / "symbols" / "x.png")
    (tmp_path / "symbols" / "x.txt").write_text("A sign.\n")
    found = listing("stamps", path=str(tmp_path))
    assert [(picture.name, picture.category) for picture in found.pictures] == [("a red kangaroo", "animals")]
    assert set(found.skipped) == {"animals/z.png", "animals/none.png"}


def test_of_a_wallpaper_in_several_sizes_one_is_taken(tmp_path: Path) -> None:
    images = tmp_path / "Path" / "contents" / "images"
    images.mkdir(parents=True)
    for name in ("640x480", "1920x1080", "5120x2880", "1080x1920"):
        Image.new("RGB", (8, 6)).save(images / f"{name}.png")
    about = {"KPlugin": {"Authors": [{"Name": "Somebody"}], "License": "CC-BY-SA-4.0", "Name": "Path"}}
    (tmp_path / "Path" / "metadata.json").write_text(json.dumps(about))
    Image.new("RGB", (8, 6)).save(tmp_path / "my-garden.jpg")
    found = listing("photographs", paths=[str(tmp_path)])
    assert {Path(picture.locator.path).name: picture.name for picture in found.pictures} == {
        "1920x1080.png": "a path through a forest",
        "my-garden.jpg": "my garden",
    }
    assert [row["author"] for row in found.credits if row["title"] == "Path"] == ["Somebody"]


def test_every_cover_can_be_drawn_and_editions_differ() -> None:
    covers = listing("drawn-covers", editions=2).pictures
    assert len(covers) > 200
    drawn = [draw_cover(picture.locator.member) for picture in covers[:6]]
    assert {image.size for image in drawn} == {(WIDTH, HEIGHT)}
    assert len({image.tobytes() for image in drawn}) == 6
    assert draw_cover(covers[0].locator.member).tobytes() == drawn[0].tobytes()
    longest = max(covers, key=lambda picture: len(picture.facts["title"]))
    shortest = min(covers, key=lambda picture: len(picture.facts["title"]))
    for picture in (longest, shortest):
        draw_cover(picture.locator.member)
