"""A run that was killed, stopped or moved to another number of ranks goes on as if nothing had happened."""

import json
import signal
from pathlib import Path

import pytest


def steps(output_dir: Path, rank: int = 0) -> dict[int, float]:
    """Step -> train/loss, of the last process that made the step."""
    lines = map(json.loads, (output_dir / f"record-{rank}.jsonl").read_text().splitlines())
    return {line["step"]: line["metrics"]["train/loss"] for line in lines if line["event"] == "step"}


def keys(output_dir: Path) -> dict[int, list[str]]:
    lines = map(json.loads, (output_dir / "record-0.jsonl").read_text().splitlines())
    return {line["step"]: line["keys"] for line in lines if line["event"] == "step"}


SETTINGS = {"total_steps": 6, "save_steps": 2, "frozen": ["tower.0"], "resume": "auto"}


@pytest.fixture(scope="module")
def uninterrupted(launch, tmp_path_factory):
    """Six steps in fp32 and bf16 on two ranks."""
    found = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path_factory.mktemp(precision)
        outcome = launch("train", world_size=2, output_dir=str(folder), precision=precision, **SETTINGS).check()
        found[precision] = (folder, outcome.results[0])
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_run_resumes_with_exactly_the_losses_of_an_uninterrupted_one(launch, tmp_path, uninterrupted, precision):
    kill = {5: (-1 if precision == "fp32" else 1, signal.SIGKILL)}  # all ranks, or one of them
    run = {"world_size": 2, "output_dir": str(tmp_path), "precision": precision, **SETTINGS}
    killed = launch("train", signals=kill, signals_wait_for=("latest", "checkpoint-4"), **run)
    assert killed.exit_codes[1] == -signal.SIGKILL and 0 not in killed.exit_codes
    resumed = launch("train", seed=123, **run)
    if precision == "fp32":  # the frozen tower was made from another seed: it is not the one that was trained with
        assert resumed.exit_codes == [2, 2]
        assert "frozen weights of vision" in resumed.results[0]["message"]
    resumed = launch("train", **run).check()
    folder, expected = uninterrupted[precision]
    assert resumed.results[0]["first"] == 5
    assert steps(tmp_path) == steps(folder)
    assert keys(tmp_path) == keys(folder)
    assert resumed.results[0]["weights"] == expected["weights"]
    assert resumed.results[0]["state"] == expected["state"]
    assert resumed.results[0]["state"]["tracker_run_id"] == "run-1"


def test_training_goes_on_while_a_checkpoint_is_written_and_its_state_is_that_of_its_step(
    launch, tmp_path, uninterrupted
):
    """Rank 1 ends its file only when two more updates were made; then both are killed. Waiting for it would hang."""
    run = {"world_size": 2, "output_dir": str(tmp_path), **SETTINGS}
    held = {"rank": 1, "step": 2, "until": 4}
    kill = {"signals": {4: (-1, signal.SIGKILL)}, "signals_wait_for": ("latest", "checkpoint-2")}
    assert launch("train", held_writes=held, **kill, **run).exit_codes == [-signal.SIGKILL] * 2
    assert not list(tmp_path.glob("*checkpoint-4*"))
    resumed = launch("train", **run).check()
    folder, expected = uninterrupted["fp32"]
    assert resumed.results[0]["first"] == 3
    assert steps(tmp_path) == steps(folder)
    assert resumed.results[0]["weights"] == expected["weights"]


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_killed_while_a_checkpoint_is_written_the_one_before_is_the_last(launch, tmp_path, slow_rank):
    run = {"world_size": 2, "output_dir": str(tmp_path), **SETTINGS}
    held = {"rank": slow_rank, "step": 4, "until": 99}
    other = (f".checkpoint-4.partial/rng-{1 - slow_rank:05d}.json", "")  # the other rank has written all of its own
    killed = launch("train", held_writes=held, signals={5: (-1, signal.SIGKILL)}, signals_wait_for=other, **run)
    assert killed.exit_codes == [-signal.SIGKILL] * 2
    assert (tmp_path / "latest").read_text() == "checkpoint-2\n" and not (tmp_path / "checkpoint-4").exists()
    assert launch("train", **run).check().results[0]["first"] == 3
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_bf16_trains_close_to_fp32(uninterrupted):
    """bf16 has 8 bits: 0.4 % a rounding."""
    close = steps(uninterrupted["fp32"][0])
    assert steps(uninterrupted["bf16"][0]) == pytest.approx(close, rel=0.03)


@pytest.mark.parametrize("path", [(2, 1), (1, 2, 3)])
def test_checkpoint_is_resumed_on_another_number_of_ranks(launch, tmp_path, uninterrupted, path):
    for i, world_size in enumerate(path):
        total = {0: 2, len(path) - 1: 6}.get(i, 4)
        # The schedule is that of six steps in every piece.
        stop = {total: (0, signal.SIGTERM)} if total < 6 else {}
        outcome = launch(
            "train", world_size=world_size, output_dir=str(tmp_path), signals=stop, **{**SETTINGS, "save_steps": None}
        )
        assert set(outcome.exit_codes) == ({143} if total < 6 else {0}), outcome.logs
    folder, expected = uninterrupted["fp32"]
    assert keys(tmp_path) == keys(folder)
    assert steps(tmp_path) == pytest.approx(steps(folder), rel=1e-5)
    for name, weight in expected["weights"].items():
        found = outcome.results[0]["weights"][name]
        rows = zip(weight, found) if isinstance(weight[0], list) else [(weight, found)]
        for row, found_row in rows:
            assert found_row == pytest.approx(row, abs=5e-5), name


def test_sigterm_to_one_rank_saves_and_ends_all_with_143(launch, tmp_path):
    outcome = launch("train", world_size=2, output_dir=str(tmp_path), total_steps=50, signals={2: (1, signal.SIGTERM)})
    assert outcome.exit_codes == [143, 143]
    assert {result["error"] for result in outcome.results} == {"Terminated"}
    assert (tmp_path / "latest").read_text().strip() == "checkpoint-3"  # the ranks agree in the next step
    assert (tmp_path / "checkpoint-3" / "COMPLETE").is_file()
    last = json.loads((tmp_path / "record-0.jsonl").read_text().splitlines()[-1])
    assert last == {"event": "end", "status": "terminated"}


def test_keeps_the_last_checkpoints_and_the_best(launch, tmp_path):
    launch(
        "train", world_size=1, output_dir=str(tmp_path), total_steps=8, save_steps=1, evaluate_every=1, resume="auto"
    ).check()
    lines = list(map(json.loads, (tmp_path / "record-0.jsonl").read_text().splitlines()))
    evaluated = [line["metrics"]["eval/loss"] for line in lines if line["event"] == "evaluate"]
    best = evaluated.index(min(evaluated)) + 1
    assert [line["best_step"] for line in lines if line["event"] == "save"][-1] == best
    assert [line["step"] for line in lines if line["event"] == "save"] == list(range(1, 9))
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-7", "checkpoint-8", f"checkpoint-{best}"}
    assert not list(tmp_path.glob(".checkpoint*"))


def test_full_disk_ends_all_ranks_clearly_and_leaves_the_checkpoint_before(launch, tmp_path):
    run = {"world_size": 2, "output_dir": str(tmp_path), "total_steps": 4, "save_steps": 2, "resume": "auto"}
    outcome = launch("train", limit_file_size_after=3, **run)
    assert outcome.exit_codes == [1, 1]
    for result in outcome.results:
        assert result["error"] == "TrainingError" and "checkpoint-4 could not be saved" in result["message"]
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert launch("train", **run).check().results[0]["first"] == 3


def test_full_disk_while_training_goes_on_ends_it_before_another_save(launch, tmp_path):
    run = {"world_size": 2, "output_dir": str(tmp_path), "total_steps": 50, "save_steps": 2, "resume": "auto"}
    outcome = launch("train", limit_file_size_after=3, **run)
    assert outcome.exit_codes == [1, 1]
    for result in outcome.results:
        assert result["error"] == "TrainingError" and "checkpoint-4 could not be saved" in result["message"]
    assert 4 <= max(steps(tmp_path)) <= 6
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]


def test_stall_of_a_save_is_a_metric_of_the_next_log_line(launch, tmp_path):
    launch("train", world_size=2, output_dir=str(tmp_path), total_steps=5, save_steps=3).check()
    lines = list(map(json.loads, (tmp_path / "record-0.jsonl").read_text().splitlines()))
    stalls = {
        line["step"]: line["metrics"]["perf/checkpoint_stall_seconds"]
        for line in lines
        if line["event"] == "step" and "perf/checkpoint_stall_seconds" in line["metrics"]
    }
    assert set(stalls) in ({4}, {4, 5}) and stalls[4] > 0  # begun after step 3, ended after step 3 or later


def test_loading_refuses_gaps_and_other_frozen_weights_and_names_them(launch, tmp_path):
    launch("train", world_size=1, output_dir=str(tmp_path), total_steps=1, frozen=["tower"]).check()
    said = launch("refusals", world_size=1, output_dir=str(tmp_path)).check().results[0]
    assert "the model trains but the checkpoint lacks: query" in said["missing"]
    assert "the checkpoint holds but the model does not train: adapter.weight" in said["extra"]
    assert "query [1, 9] in the checkpoint, [1, 8] in the model" in said["shape"]
    assert "frozen weights of vision" in said["frozen"] and "tower.0.weight" in said["frozen"]
    assert said["whole"] == "loaded"
    assert said["truncated"].startswith("CheckpointError") and "fragments-00000" in said["truncated"]
    assert "no complete checkpoint" in said["torn"]
    assert said["auto"] == "None" and said["complete"] == []
