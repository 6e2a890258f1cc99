"""The main job, whole: launcher, ZeRO-3 over two processes, tracking, export, evaluation; then what people do next."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]


def rows(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "logging.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)
def test_a_run_under_ray_leaves_a_finished_run_that_others_can_use(
    write_recipe: Callable[..., Path], launch: Launch, samtrain_cli: Launch, tmp_path: Path, world: Path
) -> None:
    recipe, run = write_recipe(), tmp_path / "runs" / "run"
    done = launch(recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny: finished" in done.stdout and "step 6/6" in done.stdout
    assert "losses by context" in done.stdout and "context gain of 1 sets" in done.stdout

    losses = [row["train/loss"] for row in rows(run) if "train/loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    last = [row for row in rows(run) if "perf/mfu" in row][-1]
    parts = sum(last[f"perf/mfu_{part}"] for part in ("vision", "qformer", "llm"))
    assert 0 < last["perf/mfu"] < 1 and parts == pytest.approx(last["perf/mfu"])
    assert len((run / "ledger.jsonl").read_text().splitlines()) == 6
    finished = json.loads((run / "finished.json").read_text())
    assert finished["train_state"]["num_samples"] == 48
    check_tracked(tmp_path / "runs" / "mlflow.db", losses)

    # A fresh process evaluates the exported folder and gets the run's own answers; scoring them gives its scores.
    again = samtrain_cli(
        "eval", run / "model", "--data", world / "data" / "test", "--output", tmp_path / "again",
        "--num-beams", "2", "--max-new-tokens", "8", "--num-workers", "2", "--context-gain",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    ours = json.loads((run / "predictions" / "test.colour" / "pred.json").read_text())
    assert json.loads((tmp_path / "again" / "test.colour" / "pred.json").read_text()) == ours
    gains = [
        json.loads((folder / "scores.json").read_text())["context_gain"]["test.colour"]["gain_none"]
        for folder in (run / "predictions", tmp_path / "again")
    ]
    assert gains[0] == pytest.approx(gains[1], abs=1e-5) and gains[0] != 0.0
    scored = samtrain_cli("score", run / "predictions", "--json")
    assert json.loads(scored.stdout)["test.colour"]["cider"] == pytest.approx(
        finished["scores"]["scores"]["test.colour"]["cider"]
    )
    check_generate(samtrain_cli, run, tmp_path, world)

    # The same recipe again: the finished run stays, a new one starts beside it.
    plan = launch(recipe, "--dry-run")
    assert plan.returncode == 0 and "run-2" in plan.stdout


def check_tracked(database: Path, losses: list[float]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name("samtrain").experiment_id])
    assert run.info.status == "FINISHED"
    logged = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.value for point in sorted(logged, key=lambda p: p.step)] == pytest.approx(losses)
    scores = ("cider", "majority/cider", "context_gain_none", "context_gain_shuffled")
    for metric in ("eval/loss", "perf/data_wait_frac", *(f"eval/test.colour/{score}" for score in scores)):
        assert metric in run.data.metrics
    for parameter in ("train.learning_rate", "parameters/guidance/trainable", "versions/torch", "peak_tflops"):
        assert parameter in run.data.params
    assert len(run.inputs.dataset_inputs) == 1
    files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"recipe.yaml", "ledger.jsonl", "logging.jsonl", "curves.png", "examples.json", "model"} <= files


def check_generate(samtrain_cli: Launch, run: Path, tmp_path: Path, world: Path) -> None:
    from samtrain.data.index import ShardIndex

    index = ShardIndex.load(world / "data" / "test")
    record, images = index.read_sample(0)
    paths = []
    for i, data in enumerate(images):
        paths.append(tmp_path / f"{i}.jpg")
        paths[-1].write_bytes(data)
    beams = ("--num-beams", "2", "--max-new-tokens", "8")
    answer = samtrain_cli("generate", run / "model", *paths, "--prompt", record.instruction, *beams)
    assert answer.returncode == 0, answer.stderr
    ours = json.loads((run / "predictions" / "test.colour" / "pred.json").read_text())
    assert answer.stdout.strip() == ours[0]["pred_response"]
    (tmp_path / "note.jpg").write_text("not an image")
    refused = samtrain_cli("generate", run / "model", tmp_path / "note.jpg", "--prompt", "What ?")
    assert refused.returncode == 2 and "note.jpg" in refused.stderr
