"""What runs when a GPU is at hand: in order, as far as the time goes, and on from there in the next call."""

import json
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.gpu import STAGES, Stage, State, pack, run_process, run_stages

A, B, C = (Stage(name, (name,), seconds, "a test") for name, seconds in (("a", 100), ("b", 300), ("c", 100)))


class Machine:
    """Runs nothing; each stage takes `takes` seconds and ends with the code it is given."""

    def __init__(self, takes: float = 50.0, codes: dict[str, int | None] | None = None) -> None:
        self.now, self.takes, self.codes, self.ran = 0.0, takes, codes or {}, list[str]()

    def run(self, stage: Stage, log: Path) -> int | None:
        self.ran.append(stage.name)
        self.now += self.takes
        log.write_text("printed by it\n")
        return self.codes.get(stage.name, 0)


def call(machine: Machine, folder: Path, *, seconds: float, skip_failed: bool = False) -> bool:
    machine.ran.clear()
    return run_stages(
        (A, B, C), State(folder / "state.json"), seconds=seconds, skip_failed=skip_failed, run=machine.run,
        logs=folder / "logs", commit="0" * 40, clock=lambda: machine.now, say=lambda line: None,
    )  # fmt: skip


def test_a_call_runs_what_fits_and_the_next_goes_on(tmp_path: Path) -> None:
    machine = Machine()
    assert not call(machine, tmp_path, seconds=250)
    assert machine.ran == ["a", "c"]  # b might not end in time; a shorter one still does
    assert call(machine, tmp_path, seconds=400) and machine.ran == ["b"]
    assert call(machine, tmp_path, seconds=400) and machine.ran == []


def test_what_was_cut_off_or_failed_runs_again(tmp_path: Path) -> None:
    machine = Machine(codes={"a": None, "c": 1})
    assert not call(machine, tmp_path, seconds=1000) and machine.ran == ["a", "b", "c"]
    assert not call(machine, tmp_path, seconds=1000, skip_failed=True) and machine.ran == ["a"]
    machine.codes.clear()
    assert call(machine, tmp_path, seconds=1000) and machine.ran == ["a", "c"]
    noted = json.loads((tmp_path / "state.json").read_text())
    assert noted["c"] == {"status": "ok", "seconds": 50, "exit_code": 0, "commit": "0" * 40}


def test_a_call_that_is_killed_leaves_its_stage_to_be_run_again(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    machine = Machine()

    def dies(stage: Stage, log: Path) -> int | None:
        raise Killed

    with pytest.raises(Killed):
        run_stages((A,), State(tmp_path / "state.json"), seconds=500, run=dies, logs=tmp_path, commit="", say=print)
    assert call(machine, tmp_path, seconds=1000) and machine.ran[0] == "a"


def test_a_stage_is_a_process_with_a_limit_that_finds_both_packages(tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('samtrain_kernels').origin); raise SystemExit(3)"
    assert run_process(Stage("x", ("-c", code), 60, ""), tmp_path / "log") == 3
    assert str(gpu.ROOT / "kernels") in (tmp_path / "log").read_text()
    assert run_process(Stage("x", ("-c", "import time; print(1); time.sleep(60)"), 1, ""), tmp_path / "log") is None


def test_an_archive_holds_what_is_new_at_its_place(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results" / "gpu-logs"
    configs = tmp_path / "kernels" / "samtrain_kernels" / "image_mix" / "configs"
    for folder in (results, configs):
        folder.mkdir(parents=True)
    (results / "a.log").write_text("new")
    (configs / "h200.json").write_text("new")
    written = (results / "a.log").stat().st_mtime
    names = pack(tmp_path / "out" / "x.tar.gz", since=written - 1, root=tmp_path)
    assert names == ["benchmarks/results/gpu-logs/a.log", "kernels/samtrain_kernels/image_mix/configs/h200.json"]
    with tarfile.open(tmp_path / "out" / "x.tar.gz") as tar:
        assert tar.getnames() == names
    assert pack(tmp_path / "x.tar.gz", since=written + 5, root=tmp_path) == []


def test_stages_have_names_of_their_own_and_fit_into_a_call() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert all(stage.seconds + gpu.OVERHEAD_SECONDS <= 9.7 * 60 for stage in STAGES)


def test_without_a_gpu_it_says_so_and_an_unknown_stage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_has_gpu", lambda: False)
    assert CliRunner().invoke(gpu.app, []).exit_code == 2
    refused = CliRunner().invoke(gpu.app, ["--stage", "nothing"])
    assert refused.exit_code == 2 and "nothing" in refused.output
    listed = CliRunner().invoke(gpu.app, ["--list"])
    assert listed.exit_code == 0 and "train-7b-frozen" in listed.output
