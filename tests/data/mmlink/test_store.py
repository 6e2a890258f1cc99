"""Results survive kills; damage is found, named and done again."""

import os
from pathlib import Path

import pytest

from samtrain.core.errors import DataError
from samtrain.data.mmlink.store import META, Store, remove_leftovers


def test_what_is_written_is_found_by_another_process_s_store(tmp_path: Path) -> None:
    refs = Store(tmp_path).write("fill", [("a", {META: b'{"x": 1}', "0.jpg": b"one"}), ("b", {META: b"{}"})])
    other = Store(tmp_path)
    assert other.scan("fill") == {"a": refs[0], "b": refs[1]}
    assert other.read(refs[0], "0.jpg") == b"one" and other.meta(refs[0]) == {"x": 1}
    assert other.scan("nothing yet") == {}
    with pytest.raises(DataError, match=r"cannot read b/0\.jpg"):
        other.read(refs[1], "0.jpg")


def test_what_results_took_is_known_to_later_builds(tmp_path: Path) -> None:
    refs = Store(tmp_path).write(
        "fill", [("a", {META: b"{}"}), ("b", {META: b"{}"})], {"a": (2.0, 1.0), "b": (4.0, 3.0)}
    )
    others = Store(tmp_path).write("fill", [("c", {META: b"{}"})])  # by whoever kept no times
    assert Store(tmp_path).took(refs) == (6.0, 4.0)
    assert Store(tmp_path).took([refs[1], *others]) == (4.0, 3.0)


def test_a_torn_segment_is_set_aside_and_the_others_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    (first,) = store.write("read", [("a", {META: b"{}"})])
    (second,) = store.write("read", [("b", {META: b"{}"})])
    path = tmp_path / first.split(":")[0]
    path.write_bytes(path.read_bytes()[:40])
    assert Store(tmp_path).scan("read") == {"b": second}
    assert path.with_name(path.name + ".damaged").exists() and not path.exists()


def test_changed_bytes_are_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    (ref,) = Store(tmp_path).write("read", [("a", {"picture.png": b"x" * 500})])
    path = tmp_path / ref.split(":")[0]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="delete this file and build again") as caught:
        Store(tmp_path).read(ref, "picture.png")
    assert path.name in str(caught.value)


def test_a_ref_cannot_lead_out_of_the_work_folder(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (ref,) = Store(tmp_path).write("outside", [("a", {META: b"{}"})])
    with pytest.raises(DataError, match="no segment"):
        Store(work).read(f"../{ref}", META)


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / "read" / ".x.zip.1.tmp", tmp_path / "read" / ".y.zip.2.tmp"
    old.parent.mkdir()
    old.write_bytes(b"")
    young.write_bytes(b"")
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert young.exists() and not old.exists()
