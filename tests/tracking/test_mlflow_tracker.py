"""Against real stores: an embedded SQLite file, and a real server that is killed (SIGKILL) and comes back."""

import json
import math
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from samtrain.core.errors import InputError
from samtrain.tracking import replay as replay_command
from samtrain.tracking.mlflow_tracker import MlflowTracker, _artifact_location, replay
from samtrain.tracking.options import TrackingOptions
from samtrain.tracking.protocol import Example


class Run:
    """A tracker in a folder, with what it said."""

    def __init__(self, folder, uri=None, *, patience_seconds=60.0, system_metrics=False, **arguments):
        self.folder, self.events = folder, []
        self.tracker = MlflowTracker(
            TrackingOptions(tracking_uri=uri, experiment_name="claims", system_metrics=system_metrics),
            run_name="mini", spool_folder=folder / "mlflow-spool", default_store=folder / "runs",
            emit=self.events.append, patience_seconds=patience_seconds, **arguments,
        )  # fmt: skip
        self.spool = folder / "mlflow-spool"

    @property
    def warnings(self):
        return [event["text"] for event in self.events if event["level"] == "warning"]

    @property
    def client(self):
        return MlflowClient(self.tracker.tracking_uri)

    def stored(self):
        return self.client.get_run(self.tracker.run_id)

    def points(self, key):
        history = self.client.get_metric_history(self.tracker.run_id, key)
        return sorted((point.step, point.value) for point in history)

    def artifacts(self, folder=None):
        return sorted(entry.path for entry in self.client.list_artifacts(self.tracker.run_id, folder))

    def table(self, file):
        content = json.loads(Path(self.client.download_artifacts(self.tracker.run_id, file)).read_text())
        return [dict(zip(content["columns"], row)) for row in content["data"]]


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_everything_of_a_run_is_in_the_embedded_store(tmp_path):
    from matplotlib.figure import Figure

    run = Run(tmp_path)
    tracker = run.tracker
    tracker.log_params({"train": {"learning_rate": 2e-5, "empty": {}}, "name": "mini", "long": "x" * 7000})
    tracker.set_tags({"git commit": "abc"})
    for step in range(3):
        tracker.log_metrics({"train/loss": 2.0 - step, "odd näme/(x)": math.nan}, step=step)
    tracker.log_dataset(name="mmlink-mini", digest="d" * 64, path="data/train", num_samples=7)
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    tracker.log_artifact(tmp_path / "ledger.jsonl")
    tracker.log_text("name: mini\n", "recipe/resolved.yaml")
    tracker.log_figure(Figure(), "plots/curves.png")
    (tmp_path / "export" / "sub").mkdir(parents=True)
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "export" / "sub" / "x.txt").write_text("x")
    tracker.log_model_folder(tmp_path / "export")
    picture = tmp_path / "b.png"
    Image.new("RGB", (30, 60), "red").save(picture)
    examples = [
        Example("k0", [Image.new("RGB", (50, 50), "blue"), picture], "What is shared?", "a cat", "a dog"),
        Example("k1", [], "Nothing?", "", "nothing"),
    ]
    tracker.log_examples(examples, artifact_file="examples/generations.json")
    tracker.finish("FINISHED")

    stored = run.stored()
    assert stored.info.status == "FINISHED" and stored.info.run_name == "mini"
    assert run.client.get_experiment(stored.info.experiment_id).name == "claims"
    expected = {"train.learning_rate": "2e-05", "train.empty": "{}", "name": "mini", "long": "x" * 6000}
    assert stored.data.params == expected
    assert stored.data.tags["git_commit"] == "abc" and stored.data.tags["mlflow.user"]
    assert run.points("train/loss") == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert [step for step, value in run.points("odd_n_me/_x_") if math.isnan(value)] == [0, 1, 2]
    (dataset,) = [entry.dataset for entry in stored.inputs.dataset_inputs]
    assert dataset.name == "mmlink-mini" and dataset.digest == "d" * 36
    assert json.loads(dataset.profile) == {"num_samples": 7, "digest": "d" * 64}
    assert run.artifacts() == ["examples", "ledger.jsonl", "model", "plots", "recipe", "table_images"]
    assert run.artifacts("model") == ["model/config.json", "model/sub"]
    assert run.artifacts("plots") == ["plots/curves.png"]
    rows = run.table("examples/generations.json")
    assert [(row["key"], row["prediction"], row["reference"]) for row in rows] == [
        ("k0", "a cat", "a dog"),
        ("k1", "", "nothing"),
    ]
    image = rows[0]["images"]
    assert image["type"] == "image" and rows[1]["images"]["type"] == "image"
    strip = Image.open(run.client.download_artifacts(stored.info.run_id, image["filepath"]))
    assert strip.size == (160 + 4 + 80, 160)
    assert strip.getpixel((10, 80)) == (0, 0, 255) and strip.getpixel((200, 80)) == (255, 0, 0)
    assert (tmp_path / "runs" / "mlflow.db").exists() and (tmp_path / "runs" / "mlartifacts").is_dir()
    assert not run.spool.exists() and run.warnings == []


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_status_is_the_one_given_once(tmp_path, status):
    run = Run(tmp_path)
    run.tracker.finish(status)
    run.tracker.finish("FINISHED")
    assert run.stored().info.status == status
    run.tracker.log_metrics({"late": 1.0}, step=1)
    assert "after the run's end" in run.warnings[0] and not run.spool.exists()


def test_resume_appends_and_does_not_repeat_equal_points(tmp_path):
    first = Run(tmp_path)
    first.tracker.log_params({"seed": 1})
    for step in range(4):
        first.tracker.log_metrics({"train/loss": 1.0 / (step + 1), "perf/rate": step}, step=step)
    first.tracker.finish("KILLED")
    second = Run(tmp_path, run_id=first.tracker.run_id)
    second.tracker.log_params({"seed": 1, "new": 2})
    for step in range(2, 6):  # from a checkpoint at step 1: 2 and 3 are made again
        second.tracker.log_metrics({"train/loss": 1.0 / (step + 1), "perf/rate": step + 100}, step=step)
    wait_for(lambda: second.points("perf/rate")[-1] == (5, 105.0))
    assert second.stored().info.status == "RUNNING"
    second.tracker.finish("FINISHED")
    assert second.tracker.run_id == first.tracker.run_id
    assert second.points("train/loss") == [(step, 1.0 / (step + 1)) for step in range(6)]
    assert [step for step, _ in second.points("perf/rate")] == [0, 1, 2, 2, 3, 3, 4, 5]  # other values: both are kept
    assert second.stored().data.params == {"seed": "1", "new": "2"} and second.warnings == []


def test_a_changed_parameter_of_a_resumed_run_is_said(tmp_path):
    first = Run(tmp_path)
    first.tracker.log_params({"train.max_steps": 10})
    first.tracker.finish("FINISHED")
    second = Run(tmp_path, run_id=first.tracker.run_id)
    second.tracker.log_params({"train.max_steps": 20})
    second.tracker.finish("FINISHED")
    assert second.stored().data.params == {"train.max_steps": "10"}
    assert "train.max_steps: 10 -> 20" in second.warnings[0]


def test_an_unknown_run_id_makes_a_new_run_and_says_so(tmp_path):
    run = Run(tmp_path, run_id="0" * 32)
    run.tracker.log_metrics({"x": 1.0}, step=0)
    run.tracker.finish("FINISHED")
    assert run.tracker.run_id != "0" * 32 and run.points("x") == [(0, 1.0)]
    assert "no run 000" in run.warnings[0]


def test_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from-environment")
    monkeypatch.chdir(tmp_path)
    first = Run(tmp_path, "http://127.0.0.1:9")
    first.tracker.finish("FINISHED")
    assert first.client.get_experiment(first.stored().info.experiment_id).name == "from-environment"
    monkeypatch.setenv("MLFLOW_RUN_ID", first.tracker.run_id)
    second = Run(tmp_path, "http://127.0.0.1:9", run_id="1" * 32)
    second.tracker.finish("FINISHED")
    assert second.tracker.run_id == first.tracker.run_id and not (tmp_path / "runs").exists()


def test_a_database_named_by_uri_keeps_artifacts_beside_it_and_leaves_the_working_directory_alone(
    tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = Run(tmp_path / "out", f"sqlite:///{tmp_path}/stores/mlflow.db")
    run.tracker.log_text("name: mini\n", "recipe.yaml")
    run.tracker.finish("FINISHED")
    assert run.artifacts() == ["recipe.yaml"] and list((tmp_path / "stores" / "mlartifacts").rglob("recipe.yaml"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:////data/mlflow.db", "file:///data/mlartifacts"),
        ("sqlite:////data/mlflow.db?timeout=5", "file:///data/mlartifacts"),
        ("postgresql+psycopg2://user:secret@host/db", "file:///runs/mlartifacts"),
        ("http://127.0.0.1:5000", None),
        ("https://tracking.example", None),
        ("/data/mlruns", None),
        ("databricks", None),
    ],
)
def test_only_a_database_without_a_server_is_told_where_artifacts_go(uri, expected):
    assert _artifact_location(uri, default_store=Path("/runs")) == expected


def test_what_mlflow_refuses_does_not_hold_up_the_rest(tmp_path):
    run = Run(tmp_path)
    run.tracker.log_artifact(tmp_path / "absent.txt")
    run.tracker._append("nonsense")
    run.tracker.log_metrics({"x": 1.0}, step=0)
    run.tracker.finish("FINISHED")
    assert run.points("x") == [(0, 1.0)] and run.stored().info.status == "FINISHED"
    assert [("absent.txt is gone" in w, "nobody knows" in w) for w in run.warnings] == [(True, False), (False, True)]


def test_system_metrics_are_logged_and_continue_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    key, first = "system/cpu_utilization_percentage", Run(tmp_path, system_metrics=True)
    wait_for(lambda: first.tracker.run_id and len(first.points(key)) >= 2)
    first.tracker.finish("KILLED")
    steps = [step for step, _ in first.points(key)]
    assert steps == list(range(len(steps)))
    second = Run(tmp_path, system_metrics=True, run_id=first.tracker.run_id)
    wait_for(lambda: len(second.points(key)) >= len(steps) + 2)
    second.tracker.finish("FINISHED")
    steps = [step for step, _ in second.points(key)]
    assert steps == list(range(len(steps))) and not second.spool.exists()


def test_http_settings_are_put_back(tmp_path, monkeypatch):
    retries, backoff = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"
    monkeypatch.setenv(backoff, "7")
    run = Run(tmp_path)
    assert os.environ[retries] == "1" and os.environ[backoff] == "7"
    run.tracker.finish("FINISHED")
    assert retries not in os.environ and os.environ[backoff] == "7"


# --- a real server that dies ---------------------------------------------------------------------------------------


def test_a_server_killed_in_the_middle_loses_and_doubles_nothing(tmp_path, server):
    run = Run(tmp_path, server.uri)
    run.tracker.log_params({"seed": 1})
    for step in range(50):
        run.tracker.log_metrics({"train/loss": float(step), "train/lr": 0.1}, step=step)
    wait_for(lambda: run.tracker.run_id and len(run.points("train/loss")) == 50)
    server.kill()

    def log_more():
        for step in range(50, 2050):
            run.tracker.log_metrics({"train/loss": float(step), "train/lr": 0.1}, step=step)
        run.tracker.log_text("kept", "note.txt")
        run.tracker.log_examples([Example("k", [], "?", "a", "b")], artifact_file="examples.json")

    caller = threading.Thread(target=log_more)
    caller.start()
    caller.join(timeout=60)  # a call that waits for the server would take 2,000 connection failures
    assert not caller.is_alive()
    wait_for(lambda: run.warnings)
    assert "training goes on" in run.warnings[0]
    assert len((run.spool / "spool.jsonl").read_text().splitlines()) == 1 + 1 + 2050 + 2

    server.start()
    run.tracker.finish("FINISHED")
    assert run.points("train/loss") == [(step, float(step)) for step in range(2050)]
    assert len(run.points("train/lr")) == 2050
    assert run.artifacts() == ["examples.json", "note.txt", "table_images"]
    assert run.stored().info.status == "FINISHED" and not run.spool.exists()
    assert [event["level"] for event in run.events] == ["warning", "info"] and "is back" in run.events[1]["text"]


def test_points_that_arrived_without_an_answer_are_not_doubled(tmp_path, server):
    """The state of an answer that got lost: the server has the points, the journal does not know."""
    run = Run(tmp_path, server.uri)
    for step in range(5):
        run.tracker.log_metrics({"x": float(step), "nan": math.nan}, step=step)
    run.tracker.log_params({"seed": 1})
    run.tracker.log_examples([Example("k", [], "?", "a", "b")], artifact_file="examples.json")
    wait_for(lambda: run.tracker.run_id and "examples.json" in run.artifacts())
    copy = tmp_path / "again" / "mlflow-spool"
    shutil.copytree(run.spool, copy)
    (copy / "state.json").unlink()  # nothing acknowledged, not even the run's creation
    run.tracker.finish("FINISHED")
    assert replay(copy, server.uri) == run.tracker.run_id
    assert run.points("x") == [(step, float(step)) for step in range(5)] and len(run.points("nan")) == 5
    assert len(run.table("examples.json")) == 1


def test_a_run_whose_server_never_answers_is_replayed_later(tmp_path, dead_server, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path, dead_server.uri.replace("http://", "http://user:secret@"), patience_seconds=1.0)
    run.tracker.log_params({"seed": 3})
    run.tracker.log_metrics({"x": 1.0}, step=1)
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    run.tracker.log_artifact(tmp_path / "ledger.jsonl")
    finisher = threading.Thread(target=run.tracker.finish, args=("FAILED",))
    finisher.start()
    finisher.join(timeout=90)
    assert not finisher.is_alive() and run.tracker.run_id is None
    assert "python -m samtrain.tracking.replay" in run.warnings[-1] and str(run.spool) in run.warnings[-1]
    assert "secret" not in "".join(run.warnings) + "".join(p.read_text() for p in run.spool.glob("*.json*"))
    with pytest.raises(InputError, match="does not answer"):
        replay(run.spool, dead_server.uri)

    dead_server.start()
    moved = tmp_path / "elsewhere"  # the whole run folder can move
    moved.mkdir()
    run.spool.rename(moved / "mlflow-spool")
    (tmp_path / "ledger.jsonl").rename(moved / "ledger.jsonl")
    assert replay_command.main([str(moved / "mlflow-spool"), "--tracking-uri", dead_server.uri]) == 0
    run_id = capsys.readouterr().out.split()[-1]
    client = MlflowClient(dead_server.uri)
    stored = client.get_run(run_id)
    assert stored.info.status == "FAILED" and stored.data.params == {"seed": "3"} and stored.data.metrics == {"x": 1.0}
    assert [entry.path for entry in client.list_artifacts(run_id)] == ["ledger.jsonl"]
    assert replay_command.main([str(moved / "mlflow-spool")]) == 2  # sent and deleted


def test_a_server_that_accepts_and_never_answers_holds_up_nobody(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        run = Run(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", patience_seconds=1.0)

        def whole_run():
            for step in range(1000):
                run.tracker.log_metrics({"x": 1.0}, step=step)
            run.tracker.finish("FINISHED")

        caller = threading.Thread(target=whole_run)
        caller.start()
        caller.join(timeout=60)  # MLflow's own timeout is 120 s a request
        assert not caller.is_alive()
        # Not the last: a request that waits in the sender's thread may end now and warn, too.
        assert any("samtrain.tracking.replay" in warning for warning in run.warnings)
    assert len((run.spool / "spool.jsonl").read_text().splitlines()) == 1002


def test_a_resumed_run_sends_what_its_crashed_predecessor_could_not(tmp_path, dead_server):
    crashed = Run(tmp_path, dead_server.uri, patience_seconds=0.5)
    crashed.tracker.log_metrics({"x": 0.0}, step=0)
    crashed.tracker._sender.finish(patience_seconds=0.1)  # the process dies: no end of the run is logged
    with open(crashed.spool / "spool.jsonl", "ab") as stream:
        stream.write(b'{"op": "metr')  # in the middle of a line
    dead_server.start()
    resumed = Run(tmp_path, dead_server.uri, resume=True)
    resumed.tracker.log_metrics({"x": 1.0}, step=1)
    resumed.tracker.finish("FINISHED")
    assert resumed.points("x") == [(0, 0.0), (1, 1.0)] and resumed.warnings == []


def test_a_new_run_does_not_take_over_the_journal_of_another(tmp_path, dead_server):
    other = Run(tmp_path, dead_server.uri, patience_seconds=0.5)
    other.tracker.log_metrics({"x": 0.0}, step=0)
    other.tracker.finish("FAILED")
    dead_server.start()
    new = Run(tmp_path, dead_server.uri)
    new.tracker.log_metrics({"x": 5.0}, step=0)
    new.tracker.finish("FINISHED")
    assert new.points("x") == [(0, 5.0)]
    (aside,) = tmp_path.glob("mlflow-spool-*")
    assert str(aside) in new.warnings[0]
    run_id = replay(aside, dead_server.uri)
    assert run_id != new.tracker.run_id and MlflowClient(dead_server.uri).get_run(run_id).data.metrics == {"x": 0.0}
