from pathlib import Path

import pytest

from samtrain.core.errors import CheckpointError, ConfigError
from samtrain.engine.checkpoint_folder import COMPLETE, complete_checkpoints, find_resume, remove_old


def make(folder: Path, *steps: int, complete: bool = True) -> None:
    for step in steps:
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
        if complete:
            (path / COMPLETE).touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_torn_checkpoints_are_invisible(tmp_path):
    make(tmp_path, 5, 10)
    make(tmp_path, 20, complete=False)
    make(tmp_path / "x", 30)
    (tmp_path / ".checkpoint-40.partial").mkdir()
    (tmp_path / ".checkpoint-40.partial" / COMPLETE).touch()
    assert list(complete_checkpoints(tmp_path)) == [5, 10]
    assert find_resume(tmp_path, "auto") == tmp_path / "checkpoint-10"


def test_auto_is_a_fresh_start_in_an_empty_or_missing_folder(tmp_path):
    assert find_resume(tmp_path, "auto") is None
    assert find_resume(tmp_path / "missing", "auto") is None
    assert find_resume(tmp_path / "missing", None) is None


def test_auto_follows_the_pointer_unless_its_checkpoint_is_torn(tmp_path):
    make(tmp_path, 5, 10, 9)
    (tmp_path / "latest").write_text("checkpoint-5\n")
    assert find_resume(tmp_path, "auto").name == "checkpoint-5"
    (tmp_path / "checkpoint-5" / COMPLETE).unlink()
    assert find_resume(tmp_path, "auto").name == "checkpoint-10"


def test_null_refuses_another_run_and_a_path_must_be_complete(tmp_path):
    make(tmp_path, 5)
    make(tmp_path, 6, complete=False)
    with pytest.raises(ConfigError, match="checkpoint-5 of another run"):
        find_resume(tmp_path, None)
    assert find_resume(tmp_path, str(tmp_path / "checkpoint-5")).name == "checkpoint-5"
    with pytest.raises(CheckpointError, match="is incomplete"):
        find_resume(tmp_path, str(tmp_path / "checkpoint-6"))
    with pytest.raises(CheckpointError, match="does not exist"):
        find_resume(tmp_path, str(tmp_path / "checkpoint-7"))


def test_retention_keeps_the_newest_the_best_and_what_another_history_wrote(tmp_path):
    make(tmp_path, 2, 4, 6, 8, 30)
    make(tmp_path, 9, complete=False)
    (tmp_path / ".checkpoint-5.partial").mkdir()
    remove_old(tmp_path, keep=2, newest=8, best=4)
    # 30 was written before the run went back to an older checkpoint; incomplete folders of a user stay.
    assert names(tmp_path) == ["checkpoint-30", "checkpoint-4", "checkpoint-6", "checkpoint-8", "checkpoint-9"]
