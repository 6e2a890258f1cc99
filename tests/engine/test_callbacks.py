from pathlib import Path

from samtrain.core.batch import IN_QUARANTINE, GlobalStep
from samtrain.engine.callbacks import Metrics, Progress
from samtrain.engine.state import SavedCheckpoint, TrainState

STEP = GlobalStep(micro_batches=(), cursor={})


def test_progress_emits_metrics_time_left_skips_and_saves():
    events = []
    progress = Progress(events.append)
    state = TrainState(global_step=2)
    progress.on_train_start(state, {"total_steps": 10})
    state.global_step = 3
    progress.on_step_end(state, STEP, {}, {})  # between log lines
    state.global_step = 4
    progress.on_step_end(state, STEP, {"train/loss": 1.5}, {"page-3": "no such file"})
    progress.on_save(SavedCheckpoint(state, Path("out/checkpoint-4"), stall_seconds=0.123, seconds=4.56))
    kinds = [event["kind"] for event in events]
    assert kinds == ["message", "message", "step", "message"]
    assert events[1]["level"] == "warning" and "page-3: no such file" in events[1]["text"]
    assert events[2]["step"] == 4 and events[2]["max_steps"] == 10 and events[2]["metrics"] == {"train/loss": 1.5}
    assert events[2]["eta_seconds"] >= 0
    assert "checkpoint-4 (training stood still for 0.12 s, complete after 4.6 s)" in events[3]["text"]


def test_metrics_hands_on_log_lines_and_evaluations_with_their_step():
    logged = []
    metrics = Metrics(lambda values, step: logged.append((step, values)))
    metrics.on_step_end(TrainState(global_step=1), STEP, {}, {})
    metrics.on_step_end(TrainState(global_step=2), STEP, {"train/loss": 1.0}, {})
    metrics.on_evaluate(TrainState(global_step=2), {"eval/loss": 2.0})
    assert logged == [(2, {"train/loss": 1.0}), (2, {"eval/loss": 2.0})]


def test_a_quarantined_shard_is_told_once_and_its_samples_are_not():
    told = []
    progress = Progress(told.append)
    step = GlobalStep(micro_batches=(), cursor={}, quarantined={"shard-000003.tar": "cut off"})
    skipped = {"a": f"{IN_QUARANTINE}shard-000003.tar", "b": "cannot be decoded"}
    progress.on_step_end(TrainState(global_step=4), step, {}, skipped)
    assert [event["text"] for event in told] == [
        "step 4: shard shard-000003.tar is quarantined: cut off",
        "step 4: skipped b: cannot be decoded",
    ]
