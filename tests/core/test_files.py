import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from samtrain.core.files import atomic_write, atomic_write_json, sha256_file


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_process_killed_before_the_rename_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    script = (
        "import os, signal, sys\n"
        "from samtrain.core import files\n"
        "files.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.atomic_write(sys.argv[1], 'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "old"


def test_json_is_readable_and_in_a_fixed_order(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", {"b": 1, "a": "ä"})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": "ä", "b": 1}
    assert text.index('"a"') < text.index('"b"') and "ä" in text


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(content)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()
