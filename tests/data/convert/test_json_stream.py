"""Streaming equals `json.load`, wherever the window ends, and broken files are named with the place."""

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samtrain.core.errors import DataError
from samtrain.data.convert import json_stream
from samtrain.data.convert.json_stream import head_of, read_array, read_field, read_lines, read_records

VALUE = [
    {"a": "é \\ \" [ ] { } , : \u2028 \U0001f600", "b": [1, -2.5, 1e300, 10**30, None, True, False, []]},
    -12.5e-3, 1234, "x\ny", {}, [], [[[{"deep": [{}]}]]], "", 0, "]", {"": ""},
]  # fmt: skip


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(json_stream, "CHUNK", size)


def values(elements: Any) -> list[Any]:
    return [element.value for element in elements]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_is_what_json_load_reads_wherever_the_window_ends(
    tmp_path: Path, small_windows: Callable[[int], None], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(VALUE, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    for size in (*range(1, 40), 1000):
        small_windows(size)
        assert values(read_array(path)) == VALUE


def test_a_field_is_found_behind_others_wherever_the_window_ends(
    tmp_path: Path, small_windows: Callable[[int], None]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"n": 1.5, "images": VALUE, "o": {"data": 3}, "data": VALUE[::-1], "m": [1]}))
    for size in range(1, 60):
        small_windows(size)
        assert values(read_array(path, "data")) == VALUE[::-1]
        assert read_field(path, "o") == {"data": 3}
        assert read_field(path, "n") == 1.5
    assert read_field(path, "nothing") is None


def test_progress_reaches_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "word " * 100}] * 3000))
    seen = [element.done for element in read_array(path)]
    assert seen == sorted(seen) and seen[0] < seen[-1] == path.stat().st_size


def test_memory_holds_a_record_and_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    row = json.dumps({"text": "word " * 400})
    with open(path, "w") as stream:
        stream.write("[" + ",".join([row] * 20_000) + "]")
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_array(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a"', "not valid JSON at character"),
        (b'[{"a": 1},', "the file ends too early"),
        (b'[{"a": 1}] more', "at character 11: more follows"),
        (b'[{"a": 1} {"a": 2}]', "at character 10: '{' where ',' or ']' was expected"),
        (b"[1,]", "not valid JSON at character 3"),
        (b"", "the file ends too early"),
        (b"{}", "'{' where '\\['"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
    ],
)
def test_a_broken_array_names_the_file_and_the_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.json: not valid JSON.*{message}|x\.json: {message}"):
        list(read_array(path))


def test_a_broken_object_names_the_file_and_the_place(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, message in (
        ('{"data": [1]} more', "at character 14: more follows"),
        ('{"data": [1], 5: 1}', "at character 14: a key was expected"),
        ('{"data": [1]', "the file ends too early"),
        ('{"other": [1]}', "has no field 'data'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            list(read_array(path, "data"))


def test_a_record_longer_than_the_limit_stops_before_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "MAX_RECORD", 10_000)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(["x" * 1_000_000]))
    with pytest.raises(DataError, match="Unterminated string"):
        list(read_array(path))
    lines = tmp_path / "x.jsonl"
    lines.write_text(json.dumps("x" * 1_000_000) + '\n{"a": 1}\n')
    first, second = read_lines(lines)
    assert first.problem == "is longer than 10000 bytes" and second.value == {"a": 1}


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert values(read_array(path)) == [1, 2]


def test_broken_lines_are_told_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n"\xff"\n' + b"[" * 100_000 + b'\n{"a": 2}')
    found = list(read_lines(path))
    assert [(one.number, one.value, one.problem is None) for one in found] == [
        (0, {"a": 1}, True), (2, None, False), (3, None, False), (4, None, False), (5, {"a": 2}, True),
    ]  # fmt: skip


def test_kinds_of_files_are_recognised(tmp_path: Path) -> None:
    def head(content: str, name: str = "x.json") -> Any:
        (tmp_path / name).write_text(content)
        return head_of(tmp_path / name)

    assert head('[{"a": 1}, {"b": 2}]').records == [{"a": 1}, {"b": 2}]
    assert head('[{"a": 1}, {"b": 2}]').has_record_with("b")
    assert not head('[{"a": 1}, {"b": 2}]').has_record_with("a", "b")
    assert head('{"a": [1, 2], "b": "x"}').fields == {"a": [1, 2], "b": ["x"]}
    assert head('{"a": 1}\n{"a": 2}\n').kind == "lines"
    assert head('{"a": 1}\n', "x.jsonl").kind == "lines"
    assert head("GIF89a").kind == "other"
    assert head_of(tmp_path).kind == "folder"
    assert values(read_records(tmp_path / "x.jsonl")) == [{"a": 1}]


def test_half_a_surrogate_pair_stays_what_it_is(tmp_path: Path) -> None:
    """What a record is made of is decided later; a reader that writes `?` for it would hide it."""
    path = tmp_path / "x.json"
    path.write_bytes(io.BytesIO(b'["\\ud800"]').getvalue())
    assert values(read_array(path)) == ["\ud800"]
