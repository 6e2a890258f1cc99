"""A run that is killed or asked to stop goes on as if nothing had happened: losses, samples, tracking run."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


def losses(output_dir: Path) -> dict[int, float]:
    lines = (output_dir / "logging.jsonl").read_text().splitlines()
    return {row["step"]: row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row}


def last_digest(output_dir: Path) -> str:
    return str(json.loads((output_dir / "ledger.jsonl").read_text().splitlines()[-1])["digest"])


def wait_for_checkpoint(process: subprocess.Popen[str], output_dir: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(output_dir.glob("checkpoint-*/COMPLETE")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_killed_and_stopped_runs_resume_exactly(
    write_recipe: Callable[..., Path],
    launch: Launch,
    start_launch: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    steps = 12
    whole = launch(write_recipe(output="whole", max_steps=steps), "--local", "evaluation.splits=[]")
    assert whole.returncode == 0, whole.stdout + whole.stderr

    recipe, run = write_recipe(output="broken", max_steps=steps), tmp_path / "runs" / "broken"
    process = start_launch(recipe, "--local", "evaluation.splits=[]")
    wait_for_checkpoint(process, run)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "finished.json").exists()

    process = start_launch(recipe, "--local", "evaluation.splits=[]")
    before = len(list(run.glob("checkpoint-*/COMPLETE")))
    deadline = time.monotonic() + 200
    while len(list(run.glob("checkpoint-*/COMPLETE"))) <= before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    # Where the machine was so fast that the run ended before the signal, it ended well.
    assert process.returncode in ((0,) if (run / "finished.json").exists() else (143,)), output

    if process.returncode == 143:
        last = launch(recipe, "--local", "evaluation.splits=[]")
        assert last.returncode == 0, last.stdout + last.stderr
    assert losses(run) == losses(tmp_path / "runs" / "whole")
    assert last_digest(run) == last_digest(tmp_path / "runs" / "whole")
    check_one_tracking_run(tmp_path / "runs" / "mlflow.db")


def check_one_tracking_run(database: Path) -> None:
    """The killed run's checkpoint names its tracking run, so that the resumed launch appends to it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    found = client.search_runs([client.get_experiment_by_name("samtrain").experiment_id])
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED"]  # the whole one, and the broken one
