"""A wrong or hanging run ends early and says why."""

import time

import pytest


@pytest.fixture(scope="module")
def after_nan(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nan")
    return folder, launch("train", world_size=2, output_dir=str(folder), nan_at=3, save_steps=2, logging_steps=5)


def test_nan_names_step_rank_and_keys_of_the_micro_batch(after_nan):
    _, outcome = after_nan
    assert outcome.exit_codes == [1, 1]
    for result in outcome.results:
        assert result["error"] == "TrainingError"
        assert result["message"].startswith("step 3:")
        assert "The loss is not finite for rank 1: s3.3." in result["message"]
        assert "the update was not applied" in result["message"]


def test_nan_leaves_the_checkpoint_that_was_begun_before_it(launch, after_nan):
    folder, _ = after_nan
    assert (folder / "latest").read_text() == "checkpoint-2\n"
    resumed = launch("train", world_size=2, output_dir=str(folder), resume="auto").check()
    assert resumed.results[0]["first"] == 3


def test_hang_of_one_rank_ends_all_with_reports_that_name_phase_and_samples(launch, tmp_path):
    since = time.monotonic()
    outcome = launch("train", world_size=2, output_dir=str(tmp_path), hang=(1, 2), timeout_seconds=3.0)
    assert time.monotonic() - since < 60  # it would sleep for an hour
    assert all(code not in (0, None) for code in outcome.exit_codes)
    assert outcome.exit_codes[1] == 1
    culprit = (tmp_path / "hang-rank1.txt").read_text()
    assert "phase `data` of step 2" in culprit and "time.sleep(3600)" in culprit
    assert "phase `data` of step 2" in outcome.logs[1]


def test_hang_in_validation_is_noticed_too(launch, tmp_path):
    outcome = launch(
        "train", world_size=1, output_dir=str(tmp_path), evaluate_every=2, hang_in_evaluation=True, timeout_seconds=2.0
    )
    assert outcome.exit_codes == [1]
    report = (tmp_path / "hang-rank0.txt").read_text()
    assert "phase `evaluate` of step 2" in report and "time.sleep(3600)" in report and "s1000.5" in report


def test_a_leap_of_the_loss_ends_the_run(launch, tmp_path):
    outcome = launch(
        "train", world_size=1, output_dir=str(tmp_path), total_steps=30, learning_rate=30.0, max_loss_spike=1.5
    )
    assert outcome.exit_codes == [1]
    assert "running mean" in outcome.results[0]["message"] and "keys of the step: s" in outcome.results[0]["message"]


def test_null_refuses_the_folder_of_another_run(launch, after_nan):
    folder, _ = after_nan
    outcome = launch("train", world_size=1, output_dir=str(folder), resume=None)
    assert outcome.exit_codes == [2] and "another run" in outcome.results[0]["message"]
