"""What is refused and why, what stops a conversion, and what is left when it stops."""

import json
import os
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samtrain.core.errors import ConfigError, DataError
from samtrain.data.convert import convert as convert_module
from samtrain.data.convert.formats import FORMATS
from samtrain.data.convert.report import Report
from samtrain.data.index import ShardIndex

Run = Callable[..., Report]
Write = Callable[[Path, Any], Path]


def annotation(*names: str, instruction: str = "i", output: str = "o", **more: Any) -> dict[str, Any]:
    return {"id": 0, "img_list": list(names), "instruction": instruction, "output": output, **more}


def listed(report_path: Path) -> list[str]:
    return [row["reason"] for row in json.loads(report_path.read_text())["listed"]]


def bomb() -> bytes:
    """A PNG whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def refused(tmp_path: Path, run: Run, picture: Any, write_json: Write) -> Callable[..., str]:
    """refused(row) is the reason why an annotation beside good ones is listed; the good ones are converted."""

    def reason(row: Any, **options: Any) -> str:
        folder = tmp_path / "set"
        picture(folder / "good.jpg", 1)
        write_json(folder / "annotations.json", [annotation("good.jpg"), row, annotation("good.jpg")])
        report = run("annotations", folder, max_bad_fraction=0.5, **options)
        (found,) = listed(report.path)
        assert len(ShardIndex.load(tmp_path / "out" / "train")) == 2
        return found

    return reason


def test_more_placeholders_than_images_are_listed(refused: Callable[..., str]) -> None:
    row = annotation("good.jpg", instruction="<image> and <image>: the same?")
    assert refused(row) == "has 2 <image> placeholders but 1 images"


def test_fewer_placeholders_than_images_are_listed(refused: Callable[..., str]) -> None:
    assert (
        refused(annotation("good.jpg", "good.jpg", instruction="<image>?")) == "has 1 <image> placeholders but 2 images"
    )


@pytest.mark.parametrize("markers", ["{image#1}{image#1}", "{image#2}{image#1}", "{image#1}", "{image#1}{image#3}"])
def test_markers_that_are_not_one_for_each_image_cannot_be_interleaved(
    refused: Callable[..., str], markers: str
) -> None:
    reason = refused(annotation("good.jpg", "good.jpg", instruction=markers), layout="interleaved")
    assert reason.startswith("its markers name images [") and "it has 2" in reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "img_list": ["good.jpg"], "output": "o"}, "`instruction` is missing, expected text"),
        ({"id": 1, "img_list": ["good.jpg"], "instruction": "i"}, "`output` is missing, expected text"),
        ({"id": 1, "instruction": "i", "output": "o"}, "`img_list` is missing, expected a list of str"),
        (annotation("good.jpg") | {"img_list": "good.jpg"}, "`img_list` is 'good.jpg', expected a list of str"),
        (annotation("good.jpg") | {"img_list": [{"a": 1}]}, "`img_list` is [{'a': 1}], expected a list of str"),
        (annotation("good.jpg") | {"output": ["o"]}, "`output` is ['o'], expected text"),
        (annotation("good.jpg") | {"output": True}, "`output` is True, expected text"),
        (annotation("good.jpg", output=" \n"), "its answer is empty"),
        (annotation("good.jpg", output="an <image>"), "its answer holds <image>"),
        (annotation(instruction=" "), "it has neither images nor an instruction"),
        (annotation("good.jpg", output="x" * 70_000), "has a text of 70000 bytes, more than 65536"),
        (annotation("good.jpg", note="x" * 1_100_000), "bytes besides its texts, more than 1000000"),
        (annotation(*["good.jpg"] * 257), "has 257 images, more than 256"),
        (annotation("good.jpg", score=float("nan")), "holds a number that is none"),
        ("text", "is 'text', expected an object"),
        (None, "is missing, expected an object"),
    ],
)
def test_broken_records_are_listed_with_their_reason(refused: Callable[..., str], row: Any, message: str) -> None:
    assert message in refused(row)


@pytest.mark.parametrize("field", ["instruction", "output", "note", "img_list"])
def test_half_a_surrogate_pair_is_listed_and_never_replaced(run: Run, tmp_path: Path, picture: Any, field: str) -> None:
    picture(tmp_path / "set" / "good.jpg", 1)
    value = ["x\ud800"] if field == "img_list" else "x\ud800"
    rows = [annotation("good.jpg"), annotation("good.jpg") | {field: value}]
    (tmp_path / "set" / "annotations.json").write_text(json.dumps(rows))  # ASCII: \ud800
    report = run("annotations", tmp_path / "set", max_bad_fraction=0.5)
    assert report.total.samples == 1 and "\\ud800" in report.first[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.jpg", "leads out of the image folder"),
        ("sub/../../outside.jpg", "leads out of the image folder"),
        ("../set-beside/a.jpg", "leads out of the image folder"),
        ("{tmp}/outside.jpg", "leads out of the image folder"),
        ("link.jpg", "leads out of the image folder"),
        ("linked/outside.jpg", "leads out of the image folder"),
        ("", "is not a file name"),
        ("a\0.jpg", "is not a file name"),
        ("http://127.0.0.1:9/x.jpg", "is a URL; nothing is fetched"),
        ("file:///etc/passwd", "is a URL; nothing is fetched"),
        ("pipe:cat /etc/passwd", "is a URL; nothing is fetched"),
        ("nowhere.jpg", "is not there"),
        ("sub", "is not a plain file"),
        ("fifo", "is not a plain file"),
        ("text.jpg", "not a JPEG, PNG or WEBP"),
        ("moving.gif", "not a JPEG, PNG or WEBP"),
        ("empty.jpg", "not a JPEG, PNG or WEBP"),
        ("bomb.png", "900000000 pixels"),
        ("large.jpg", "bytes, more than 4000"),
        ("x" * 300 + ".jpg", "cannot be opened"),
    ],
)
def test_images_that_are_not_taken(
    refused: Callable[..., str], tmp_path: Path, picture: Any, name: str, message: str
) -> None:
    folder = tmp_path / "set"
    picture(tmp_path / "outside.jpg", 2)
    picture(tmp_path / "set-beside" / "a.jpg", 2)
    (folder / "sub").mkdir(parents=True)
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "fifo")
    (folder / "text.jpg").write_text("no picture")
    (folder / "moving.gif").write_bytes(b"GIF89a\1\0\1\0\0\0\0;")
    (folder / "empty.jpg").touch()
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "large.jpg").write_bytes(b"x" * 4001)
    reason = refused(annotation(name.replace("{tmp}", str(tmp_path))), max_image_bytes=4000)
    assert message in reason and reason.startswith("image ")


def test_links_inside_the_image_folder_and_absolute_names_inside_are_fine(
    run: Run, tmp_path: Path, picture: Any, write_json: Write
) -> None:
    data = picture(tmp_path / "disk" / "real" / "a.jpg", 1)
    (tmp_path / "disk" / "link.jpg").symlink_to("real/a.jpg")
    (tmp_path / "root").symlink_to(tmp_path / "disk", target_is_directory=True)
    names = ["link.jpg", "real/../real/a.jpg", str(tmp_path / "root" / "real" / "a.jpg")]
    write_json(tmp_path / "annotations.json", [annotation(*names)])
    run("annotations", tmp_path / "annotations.json", images=str(tmp_path / "root"))
    assert ShardIndex.load(tmp_path / "out" / "train").read_sample(0)[1] == [data] * 3


def test_an_image_of_too_many_pixels_is_refused_by_its_header(
    refused: Callable[..., str], tmp_path: Path, picture: Any
) -> None:
    picture(tmp_path / "set" / "wide.png", 3, width=101, height=100)
    reason = refused(annotation("wide.png"), max_image_pixels=10_000)
    assert reason == "image 'wide.png' has 101 x 100 pixels, more than 10000"


def bad_set(folder: Path, picture: Any, write_json: Write, *, num: int, bad: set[int]) -> Path:
    picture(folder / "good.jpg", 1)
    rows = [annotation("gone.jpg" if i in bad else "good.jpg") | {"id": i} for i in range(num)]
    write_json(folder / "annotations.json", rows)
    return folder


def test_too_many_broken_records_write_nothing_but_the_report(
    run: Run, tmp_path: Path, picture: Any, write_json: Write
) -> None:
    folder = bad_set(tmp_path / "set", picture, write_json, num=100, bad={3, 50, 99})
    with pytest.raises(DataError, match=r"3 of 100 records .* --max-bad-fraction 0\.02 .* record 3: image 'gone\.jpg'"):
        run("annotations", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.convert.json", "set"]
    report = json.loads((tmp_path / "out.convert.json").read_text())
    assert report["status"] == "stopped" and "3 of 100" in report["error"]
    assert report["listed"] == [
        {"split": "train", "where": f"record {i}", "reason": "image 'gone.jpg' is not there"} for i in (3, 50, 99)
    ]
    assert report["reasons"] == {"image ... is not there": 3}


def test_as_many_as_allowed_are_listed_and_the_rest_converted(
    run: Run, tmp_path: Path, picture: Any, write_json: Write
) -> None:
    folder = bad_set(tmp_path / "set", picture, write_json, num=100, bad={3, 50})
    total = run("annotations", folder).total
    assert (total.records, total.converted, total.listed, total.samples) == (100, 98, 2, 98)
    report = json.loads((tmp_path / "out.convert.json").read_text())
    assert report["status"] == "complete" and len(report["listed"]) == 2
    keys = [entry.key for entry in ShardIndex.load(tmp_path / "out" / "train").entries]
    assert keys[2:4] == ["set-000002", "set-000004"]  # numbers are the file's: a hole stays a hole


def test_a_hopeless_set_stops_early(run: Run, tmp_path: Path, picture: Any, write_json: Write) -> None:
    folder = bad_set(tmp_path / "set", picture, write_json, num=1000, bad=set(range(1000)))
    with pytest.raises(DataError, match="21 of 21 records"):
        run("annotations", folder)


def test_strict_stops_at_the_first(run: Run, tmp_path: Path, picture: Any, write_json: Write) -> None:
    folder = bad_set(tmp_path / "set", picture, write_json, num=1000, bad={700})
    with pytest.raises(DataError, match=r"record 700: image 'gone\.jpg' is not there .--strict."):
        run("annotations", folder, strict=True)
    assert not (tmp_path / "out").exists()


def test_a_set_of_broken_records_alone_is_an_error_at_any_fraction(
    run: Run, tmp_path: Path, picture: Any, write_json: Write
) -> None:
    folder = bad_set(tmp_path / "set", picture, write_json, num=2, bad={0, 1})
    with pytest.raises(DataError, match="none of its 2 records could be used: train: record 0: image"):
        run("annotations", folder, max_bad_fraction=1)
    write_json(folder / "annotations.json", [])
    with pytest.raises(DataError, match=r"is not the authors' annotations\.json"):
        run("annotations", folder)


def test_a_file_that_breaks_off_writes_nothing(run: Run, annotations: Path, tmp_path: Path) -> None:
    path = annotations / "annotations.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"annotations\.json: not valid JSON at character \d+"):
        run("annotations", annotations)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    rows = [annotation("images/0/0.jpg")] * 50
    path.write_text(json.dumps(rows)[:-3])  # after what is read to recognise the format
    with pytest.raises(DataError, match=r"annotations\.json: not valid JSON at character \d+"):
        run("annotations", annotations)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert json.loads((tmp_path / "out.convert.json").read_text())["status"] == "stopped"


def test_an_error_of_the_machine_leaves_no_half_output(
    run: Run, annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module.ShardWriter, "_add", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        run("annotations", annotations)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sam"]


def test_a_killed_conversion_leaves_no_output_and_can_be_done_again(
    run: Run, annotations: Path, tmp_path: Path
) -> None:
    child = os.fork()
    if child == 0:
        options = convert_module.ConvertOptions(
            format="annotations", source=str(annotations), output=str(tmp_path / "out"), max_samples_per_shard=1
        )
        convert_module.convert(options, progress=lambda what, done, total: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and not (tmp_path / "out").exists() and not (tmp_path / "out.convert.json").exists()
    assert run("annotations", annotations).total.samples == 7


def test_a_second_split_that_fails_takes_the_first_with_it(run: Run, aesop: Path, tmp_path: Path) -> None:
    path = aesop / "data" / "test.json"
    path.write_text(path.read_text().replace("panel_1.png", "panel_9.png"))
    with pytest.raises(DataError, match="none of its 1 records could be used"):
        run("aesop", aesop, max_bad_fraction=1)
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_not_touched(run: Run, annotations: Path, tmp_path: Path) -> None:
    run("annotations", annotations)
    before = (tmp_path / "out.convert.json").read_bytes()
    with pytest.raises(DataError, match="out: is not empty; choose another folder or delete it"):
        run("annotations", annotations)
    assert (tmp_path / "out.convert.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    run("annotations", annotations, "empty")
    assert len(ShardIndex.load(tmp_path / "empty" / "train")) == 7


def test_a_limit_ends_each_split(run: Run, aesop: Path, vist: Path, tmp_path: Path) -> None:
    assert {n: c.samples for n, c in run("aesop", aesop, limit=1).splits.items()} == {"train": 1, "test": 1}
    assert run("vist", vist, "v", limit=1).splits["train"].samples == 1


def test_shards_roll_over_as_told(run: Run, annotations: Path, tmp_path: Path) -> None:
    run("annotations", annotations, max_samples_per_shard=3)
    assert len(ShardIndex.load(tmp_path / "out" / "train").shards) == 3


@pytest.mark.parametrize("wrong", sorted(FORMATS))
@pytest.mark.parametrize("right", ["annotations", "demon", "vist", "aesop", "ssid", "nico"])
def test_a_file_of_another_format_is_told_by_its_name(
    run: Run, wrong: str, right: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if wrong == right:
        return
    with pytest.raises(DataError, match=f"this looks like `{right}`"):
        run(wrong, request.getfixturevalue(right))
    assert not (tmp_path / "out").exists()


def test_messages_conversations_and_shards_are_told_too(
    run: Run, chat: Path, annotations: Path, tmp_path: Path, write_lines: Write
) -> None:
    write_lines(chat / "train.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    with pytest.raises(DataError, match="this looks like `messages`"):
        run("llava", chat / "train.jsonl")
    write_lines(chat / "train.jsonl", [{"conversations": []}])
    with pytest.raises(DataError, match="this looks like `llava`"):
        run("messages", chat)
    run("annotations", annotations)
    with pytest.raises(DataError, match="this looks like `shards`"):
        run("annotations", tmp_path / "out", "again")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="it looks like none of the known formats"):
        run("demon", tmp_path / "x.json", "again")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        run("demon", tmp_path / "nowhere", "again")
    with pytest.raises(DataError, match="holds no indexed shards"):
        run("shards", chat, "again", to="annotations")


def test_demon_metadata_must_be_usable(run: Run, demon: Path) -> None:
    value = json.loads((demon / "core.json").read_text())
    for field, wrong, message in (
        ("split", "../up", "split '../up' cannot be a folder's name"),
        ("task_instruction", [], "`task_instruction` is \\[\\], expected a list of texts"),
    ):
        changed = value | {"metadata": value["metadata"] | {field: wrong}}
        (demon / "core.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=message):
            run("demon", demon)


def test_two_files_of_one_split_are_refused(run: Run, demon: Path) -> None:
    (demon / "full.json").write_bytes((demon / "core.json").read_bytes())
    with pytest.raises(DataError, match=r"two of its files are of one split \(core, core\)"):
        run("demon", demon)


def test_options_that_would_be_ignored_are_refused(run: Run, aesop: Path, annotations: Path, tmp_path: Path) -> None:
    for name, options, message in (
        ("annotation", {}, "'annotation' is not known; did you mean 'annotations'"),
        ("annotations", {"group_size": 3}, "--group-size means nothing to the format annotations"),
        ("annotations", {"instructions": "x"}, "--instructions means nothing"),
        ("annotations", {"to": "messages"}, "annotations to messages: one of the two is `shards`"),
        ("shards", {}, "shards to shards"),
        ("shards", {"to": "annotations", "layout": "interleaved"}, "--layout means nothing to the format shards"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(name, annotations, **options)
    with pytest.raises(ConfigError, match=r"--split x: .* has splits of its own: train, test"):
        run("aesop", aesop, split="x")
    assert not (tmp_path / "out.convert.json").exists()


def test_progress_ends_at_a_hundred_for_each_split(aesop: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    options = convert_module.ConvertOptions(format="aesop", source=str(aesop), output=str(tmp_path / "out"))
    convert_module.convert(options, progress=lambda *now: seen.append(now))
    assert [one for one in seen if one[1] == 100] == [("train, %", 100, 100), ("test, %", 100, 100)]


def test_the_command_line(run_cli: Any, tmp_path: Path, picture: Any, write_json: Write) -> None:
    folder = bad_set(tmp_path / "set", picture, write_json, num=100, bad={3, 4, 5})
    status, out, _ = run_cli(
        "convert", "annotations", folder, tmp_path / "out", "--max-bad-fraction", "0.05", "--task", "T"
    )
    assert status == 0
    assert "3 x image ... is not there" in out and "out.convert.json" in out
    assert all(number in out for number in ("100", "97", "3"))
    assert ShardIndex.load(tmp_path / "out" / "train").read_record(0).task == "T"
    status, out, err = run_cli("convert", "annotations", folder, tmp_path / "second")
    assert (status, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("samtrain: 3 of 100 records cannot be used")
    assert "Traceback" not in err
    status, _, _ = run_cli("convert", "shards", tmp_path / "out", tmp_path / "back", "--to", "annotations")
    assert status == 0 and (tmp_path / "back" / "train" / "annotations.json").exists()
    status, _, err = run_cli("convert", "annotations", folder, tmp_path / "third", "--layout", "between")
    assert status == 2 and "`layout` = 'between'" in err
