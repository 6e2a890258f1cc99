"""Small files in the public formats, written from their documented structure, with real PNG and JPEG pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samtrain.data.convert.convert import convert
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.report import Report

DEMON_INSTRUCTIONS = [f"Instruction {i}: finish the story with the last image." for i in range(10)]


@pytest.fixture
def picture(make_jpeg: Callable[..., bytes]) -> Callable[..., bytes]:
    """picture(path, seed) writes a JPEG or PNG, by the suffix, and returns its bytes."""

    def write(path: Path, seed: int, **size: int) -> bytes:
        data = make_jpeg(seed, image_format="PNG" if path.suffix == ".png" else "JPEG", **size)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return data

    return write


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Report]:
    """run(format, source, **options) converts to tmp_path / "out"."""

    def call(name: str, source: Path, output: str = "out", **options: Any) -> Report:
        values = {"format": name, "source": str(source), "output": str(tmp_path / output), **options}
        return convert(ConvertOptions.model_validate(values))

    return call


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(name="write_json")
def write_json_fixture() -> Callable[[Path, Any], Path]:
    return write_json


@pytest.fixture(name="write_lines")
def write_lines_fixture() -> Callable[[Path, list[Any]], Path]:
    return write_lines


@pytest.fixture(name="vist_sentence")
def vist_sentence_fixture() -> Callable[[int, int], list[dict[str, Any]]]:
    return vist_sentence


@pytest.fixture
def demon_instructions() -> list[str]:
    return DEMON_INSTRUCTIONS


@pytest.fixture
def annotations(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """The authors' layout, `Conceptual/annotations.json`: records of 1 to 4 images, names in several folders."""
    folder, rows = tmp_path / "sam" / "Conceptual", []
    for i in range(7):
        names = [f"images/{i}/{j}.{'png' if j % 2 else 'jpg'}" for j in range(1 + i % 4)]
        for j, name in enumerate(names):
            picture(folder / name, 10 * i + j)
        marks = "".join(f"{{image#{j + 1}}}Caption#{j + 1}:é" for j in range(len(names)))
        rows.append(
            {"id": 100 + i, "img_list": names, "instruction": f"Sum up. {marks}", "output": f"Gemeinsam: {i} ü."}
        )
    return write_json(folder / "annotations.json", rows).parent


@pytest.fixture
def demon(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """`AESOP/core/core.json` with images/ beside it; the last record has a choice list and a table marker."""
    folder, data = tmp_path / "AESOP" / "core", []
    for i in range(4):
        names = [f"{3 * i + j}.jpg" for j in range(3)]
        for name in names:
            picture(folder / "images" / name, 50 + int(name.split(".")[0]))
        context = f"{{image#1}}Caption#1:One {i}.{{image#2}}Caption#2:Two.{{image#3}}Caption#3:"
        instance: dict[str, Any] = {"context": context, "images_path": names}
        data.append(
            {
                "sample_id": i,
                "task_instruction_id": (3 + i) % 10,
                "task_instance": instance,
                "response": f"The end {i}.",
            }
        )
    data[3]["task_instance"] |= {
        "context": "{image#1}a{table#2}b{image#3}Question: which?",
        "choice_list": ["the first", "it's the second"],
    }
    metadata = {
        "dataset": "AESOP",
        "split": "core",
        "num_sample": 4,
        "task_instruction": DEMON_INSTRUCTIONS,
        "question_type": "open-ended",
    }
    return write_json(folder / "core.json", {"metadata": metadata, "data": data}).parent


def vist_sentence(story: int, order: int) -> list[dict[str, Any]]:
    text = f"Story {story} goes on, part {order}."
    return [
        {
            "original_text": text,
            "album_id": f"7215{story}",
            "photo_flickr_id": f"{story}{order}00",
            "setting": "first-2-pick-and-tell",
            "worker_id": "FJROI8NWDRIPAM1",
            "story_id": f"{story}",
            "tier": "story-in-sequence",
            "worker_arranged_photo_order": order,
            "text": text.lower().replace(".", " .").replace(",", " ,"),
            "storylet_id": f"{story}{order}",
        }
    ]


@pytest.fixture
def vist(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """`sis/` with train (two stories, their sentences mixed) and val (one), `images/<split>/<id>.jpg` or .png."""
    root = tmp_path / "vist"
    order = {"train": [(1, 0), (2, 1), (1, 4), (1, 1), (2, 0), (1, 3), (1, 2), (2, 4), (2, 3), (2, 2)]}
    order["val"] = [(3, j) for j in range(5)]
    for split, sentences in order.items():
        for story, j in sentences:
            suffix = {2: "png", 3: "JPG"}.get(j, "jpg")
            picture(root / "images" / split / f"{story}{j}00.{suffix}", 100 * story + j)
        images = [
            {"id": f"{s}{j}00", "album_id": f"7215{s}", "url_o": "https://example.org/x.jpg"} for s, j in sentences
        ]
        rows = [vist_sentence(*sentence) for sentence in sentences]
        value = {"images": images, "albums": [{"id": "72151"}], "annotations": rows, "info": {"year": 2016}}
        write_json(root / "sis" / f"{split}.story-in-sequence.json", value)
    return root


@pytest.fixture
def aesop(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """`data/{train,test}.json` with `./data/images/<story>/panel_<i>.png`."""
    root = tmp_path / "aesop"
    for split, stories in {"train": ["0035", "4933"], "test": ["2164"]}.items():
        rows = []
        for story in stories:
            paths = [f"./data/images/{story}/panel_{j}.png" for j in range(3)]
            for j, path in enumerate(paths):
                picture(root / path, int(story) + j)
            rows.append(
                {
                    "storyid": story,
                    "theme": ["moral"],
                    "title": f"Title {story}",
                    "split": split,
                    "image_data": [[{"name": "sun", "x": 26, "pose": [-0.0236, 1e-3]}]] * 3,
                    "text": [f"{story} begins.", "It goes on.", f"{story} ends."],
                    "bg": [3, 3, 3],
                    "image_path": paths,
                    "scenetype": ["Extended-All"] * 3,
                }
            )
        write_json(root / "data" / f"{split}.json", rows)
    return root


@pytest.fixture
def ssid(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """`SSID_Annotations/SSID_<Split>.json` with `SSID_Images/<id>.jpg`; two stories about the same pictures."""
    root = tmp_path / "ssid"
    for j in range(5):
        picture(root / "SSID_Images" / f"{2036 + j}.jpg", j)
    for split, stories in {"Train": [5947, 5948], "Validation": [12], "Test": [13]}.items():
        rows = [
            [
                {
                    "storylet_id": 10 * story + j,
                    "storytext": f"{story}: sentence {j + 1}.",
                    "youtube_image_id": str(2036 + j),
                    "album_id": 10891,
                    "story_id": story,
                    "image_order": j + 1,
                }
            ]
            for story in stories
            for j in range(5)
        ]
        write_json(root / "SSID_Annotations" / f"SSID_{split}.json", {"annotations": rows})
    return root


@pytest.fixture
def nico(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """`Animal/{bear,elephant}/<context>/` and `Vehicle/truck/<context>/`."""
    root = tmp_path / "nico"
    counts = {"Animal/bear/on_snow": 6, "Animal/bear/in_forest": 4, "Animal/bear/black": 3}
    counts |= {"Animal/elephant/in zoo": 5, "Vehicle/truck/at_night": 2, "Vehicle/truck/on_road": 2}
    for number, (folder, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / folder / f"{i}.jpg", 1000 + 20 * number + i)
    return root


@pytest.fixture
def chat(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """A folder with pictures a.jpg, b.jpg, c.png for messages and conversations."""
    folder = tmp_path / "chat"
    for seed, name in enumerate(("a.jpg", "b.jpg", "c.png")):
        picture(folder / name, seed)
    return folder
