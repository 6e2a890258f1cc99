"""There and back is the identity, for records and for the bytes of images."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samtrain.core.errors import DataError
from samtrain.data.convert.report import Report
from samtrain.data.index import ShardIndex
from samtrain.data.shards import ShardWriter, build_index

Run = Callable[..., Report]
Write = Callable[[Path, Any], Path]


def read_rows(path: Path) -> list[Any]:
    if path.suffix == ".json":
        rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def pictures(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".json", ".jsonl"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


@pytest.mark.parametrize("layout", ["prefix", "interleaved"])
def test_annotations_return_as_they_were(run: Run, annotations: Path, tmp_path: Path, layout: str) -> None:
    run("annotations", annotations, "shards", layout=layout)
    report = run("shards", tmp_path / "shards", "back", to="annotations")
    back = tmp_path / "back" / "train"
    assert read_rows(back / "annotations.json") == read_rows(annotations / "annotations.json")
    assert pictures(back) == pictures(annotations)
    assert report.total.samples == 7 and not report.notes


def test_odd_annotations_return_as_they_were(run: Run, tmp_path: Path, make_jpeg: Any, write_json: Write) -> None:
    """Unknown fields, ids of any kind or none, numbers as texts, names with dots and spaces, shared pictures."""
    folder, names = tmp_path / "Odd", ["./a b.jpg", "sub/ü.PNG", "x.y.jpeg", "a b.jpg"]
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(names[:3]):
        (folder / name).write_bytes(make_jpeg(seed))
    rows = [
        {
            "id": "seven",
            "img_list": names,
            "instruction": "i \u2028 \U0001f600",
            "output": 3,
            "extra": {"a": [1.5, None]},
        },
        {"img_list": ["a b.jpg"], "instruction": "", "output": "o"},
        {"id": None, "img_list": [], "instruction": "text alone", "output": "\n o \n", "samples": 1},
    ]
    write_json(folder / "annotations.json", rows)
    report = run("annotations", folder, "shards")
    assert report.unknown_fields == {"extra": 1, "samples": 1}
    run("shards", tmp_path / "shards" / "train", "back", to="annotations")
    assert read_rows(tmp_path / "back" / "annotations.json") == rows
    assert pictures(tmp_path / "back") == pictures(folder)


@pytest.mark.parametrize("name", ["demon", "vist", "aesop", "ssid", "nico", "llava", "messages"])
@pytest.mark.parametrize("to", ["annotations", "messages"])
def test_shards_of_any_format_return_as_they_were(
    run: Run, name: str, to: str, tmp_path: Path, request: pytest.FixtureRequest, write_lines: Write
) -> None:
    """Key, task, source, meta, texts and images, by way of annotations and of messages."""
    folder = request.getfixturevalue("chat" if name in ("llava", "messages") else name)
    turns = [("user", "<image>What?"), ("assistant", "A fox."), ("user", "And <image>?"), ("assistant", "A hen.")]
    if name == "llava":
        said = [
            {"from": role.replace("user", "human").replace("assistant", "gpt"), "value": text} for role, text in turns
        ]
        write_lines(folder / "train.jsonl", [{"id": 5, "image": ["a.jpg", "c.png"], "conversations": said}])
    elif name == "messages":
        said = [{"role": role, "content": text} for role, text in turns]
        write_lines(folder / "train.jsonl", [{"messages": said, "images": ["a.jpg", "c.png"]}])
    run(name, folder, "shards")
    run("shards", tmp_path / "shards", "there", to=to)
    for split in (tmp_path / "shards").iterdir():
        run(to, tmp_path / "there" / split.name, f"back/{split.name}")
        before = ShardIndex.load(split)
        after = ShardIndex.load(next((tmp_path / "back" / split.name).iterdir()))
        assert [after.read_sample(i) for i in range(len(after))] == [before.read_sample(i) for i in range(len(before))]
        assert after.digest == before.digest


def test_messages_return_as_they_were(run: Run, chat: Path, tmp_path: Path, write_lines: Write) -> None:
    def said(*texts: Any, **more: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant" if i % 2 else "user", "content": text, **more} for i, text in enumerate(texts)]

    parts = [{"type": "image", "image": "c.png"}, {"type": "text", "text": "Which?"}]
    rows = [
        {"messages": said("<image><image>Which?", "A."), "images": ["a.jpg", "c.png"]},
        {"messages": said("No placeholder", "A."), "images": ["a.jpg", "c.png"], "source": "mine", "rank": 1},
        {"messages": said("No picture", "None.")},
        {"messages": said("No picture", "None."), "images": []},
        {"messages": said("By path", "B."), "images": [{"path": "b.jpg"}]},
        {"messages": [{"role": "system", "content": "Be brief."}, *said("q", "a")]},
        {"messages": said(parts, "C.")},
        {"messages": said("<image>q", "a", loss=True), "images": ["a.jpg"]},
    ]
    write_lines(chat / "train.jsonl", rows)
    assert run("messages", chat, "shards").unknown_fields == {"rank": 1, "source": 1}
    run("shards", tmp_path / "shards" / "train", "back", to="messages")
    assert read_rows(tmp_path / "back" / "messages.jsonl") == rows
    assert pictures(tmp_path / "back") == pictures(chat)


def test_messages_whose_pictures_cannot_keep_their_names_speak_of_the_new_ones(
    run: Run, chat: Path, tmp_path: Path, write_lines: Write
) -> None:
    name = str(chat / "a.jpg")  # absolute: it was inside the image folder there, and is not here
    parts = [{"type": "image", "image": name}, {"type": "text", "text": "q"}]
    answer = {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [{"role": "user", "content": "<image>q"}, answer], "images": [{"path": name}], "rank": 1},
        {"messages": [{"role": "user", "content": parts}, answer], "rank": 2},
    ]
    write_lines(chat / "train.jsonl", rows)
    run("messages", chat, "shards")
    report = run("shards", tmp_path / "shards" / "train", "back", to="messages")
    assert report.notes == {"images that could not keep their name": 2}
    assert read_rows(tmp_path / "back" / "messages.jsonl") == [
        {"messages": rows[0]["messages"], "images": [f"images/chat-{i:06d}.0.jpg"], "rank": i + 1} for i in range(2)
    ]
    assert set(pictures(tmp_path / "back").values()) == {(chat / "a.jpg").read_bytes()}


def write_shards(folder: Path, make_jpeg: Any, names: list[Any], **more: Any) -> Path:
    with ShardWriter(folder) as writer:
        for i, name in enumerate(names):
            meta = {"format": "annotations", "row": {"id": i}, "images": [name]}
            writer.write(key=f"k-{i}", task="t", instruction="i", output="o", images=[make_jpeg(i)], meta=meta, **more)
    return folder


HOSTILE = [
    "../../escaped.jpg", "/tmp/escaped.jpg", "a/../../../escaped.jpg", "annotations.json", "annotations.json/x.jpg",
    "back\\..\\x.jpg", "nul\0.jpg", "", ".jpg/", "x" * 300 + ".jpg", 5, "script.py", "a//b.jpg",
]  # fmt: skip


def test_hostile_names_in_shards_write_nothing_outside_and_lose_no_picture(
    run: Run, tmp_path: Path, make_jpeg: Any
) -> None:
    shards = write_shards(tmp_path / "in" / "shards", make_jpeg, HOSTILE)
    report = run("shards", shards, "a/b/c/out", to="annotations")
    rows = read_rows(tmp_path / "a/b/c/out/annotations.json")
    assert [row["img_list"] for row in rows] == [[f"images/k-{i}.0.jpg"] for i in range(len(HOSTILE))]
    assert report.notes == {"images that could not keep their name": len(HOSTILE)}
    out, files = tmp_path / "a/b/c/out", [path for path in tmp_path.rglob("*") if path.is_file()]
    elsewhere = {path for path in files if not path.is_relative_to(out) and not path.is_relative_to(shards)}
    assert elsewhere == {tmp_path / "a/b/c/out.convert.json"}
    assert sorted(path.suffix for path in out.rglob("*") if path.is_file()) == [".jpg"] * len(HOSTILE) + [".json"]


def test_a_name_that_two_pictures_want_is_given_to_one(run: Run, tmp_path: Path, make_jpeg: Any) -> None:
    shards = write_shards(tmp_path / "shards", make_jpeg, ["same.jpg", "same.jpg", "same.jpg/below.jpg"])
    run("shards", shards, to="annotations")
    names = [row["img_list"][0] for row in read_rows(tmp_path / "out" / "annotations.json")]
    assert names == ["same.jpg", "images/k-1.0.jpg", "images/k-2.0.jpg"]
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == [make_jpeg(i) for i in range(3)]


def test_masks_that_annotations_cannot_hold_are_told(run: Run, tmp_path: Path, make_jpeg: Any) -> None:
    mask = make_jpeg(9, image_format="PNG")
    shards = write_shards(tmp_path / "shards", make_jpeg, ["a.jpg", "b.jpg"], extra={"0.mask.png": mask})
    report = run("shards", shards, to="annotations")
    assert list(report.notes.values()) == [2] and "extra members" in next(iter(report.notes))


def test_headers_of_another_tar_are_no_extra_members(run: Run, tmp_path: Path, make_jpeg: Any) -> None:
    first = write_shards(tmp_path / "first", make_jpeg, ["a.jpg"])
    (tmp_path / "second").mkdir()
    with (
        tarfile.open(first / "shard-000000.tar") as old,
        tarfile.open(tmp_path / "second" / "x.tar", "w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in old:
            member.pax_headers = {"mtime": "1700000000.25"}
            new.addfile(member, old.extractfile(member))
    build_index(tmp_path / "second")
    assert not run("shards", tmp_path / "second", to="messages").notes


def test_a_damaged_picture_is_listed_when_shards_are_written_back(run: Run, tmp_path: Path, make_jpeg: Any) -> None:
    shards = write_shards(tmp_path / "shards", make_jpeg, ["a.jpg", "b.jpg"])
    entry = ShardIndex.load(shards).entries[1]
    data = bytearray((shards / "shard-000000.tar").read_bytes())
    data[entry.images[0][0] + 300] ^= 1
    (shards / "shard-000000.tar").write_bytes(data)
    with pytest.raises(DataError, match="1 of 2 records cannot be used"):
        run("shards", shards, to="annotations")
    assert not (tmp_path / "out").exists()
    report = run("shards", shards, to="annotations", max_bad_fraction=0.5)
    assert "k-1.0.jpg: sha256 is" in report.first[0]
    assert [row["id"] for row in read_rows(tmp_path / "out" / "annotations.json")] == [0]


def test_a_field_of_ours_that_somebody_changed_is_listed(
    run: Run, vist: Path, tmp_path: Path, write_json: Write
) -> None:
    run("vist", vist / "sis" / "val.story-in-sequence.json", "shards")
    run("shards", tmp_path / "shards" / "validation", "there", to="annotations")
    (row,) = read_rows(tmp_path / "there" / "annotations.json")
    changed = [
        row | {"samtrain": row["samtrain"] | {"key": "../../up"}},
        row | {"samtrain": row["samtrain"] | {"more": 1}},
        row | {"samtrain": "text"},
        row | {"mine": 1},
        row,
        row,
    ]
    run("annotations", tmp_path / "there", "renamed", task="mine")
    assert ShardIndex.load(tmp_path / "renamed" / "train").read_record(0).task == "mine"
    write_json(tmp_path / "there" / "annotations.json", changed)
    report = run("annotations", tmp_path / "there", "back", max_bad_fraction=1)
    reasons = [one["reason"] for one in json.loads(report.path.read_text())["listed"]]
    assert [reason.split(";")[0] for reason in reasons] == [
        "key '../../up' is not allowed",
        reasons[1],
        "`samtrain` is 'text', expected an object of key, task, source, meta",
        "has `samtrain` and also mine, which would be lost",
        "VIST-000000: this key was written before",
    ]
    assert reasons[1].startswith("`samtrain` is {") and report.total.samples == 1
