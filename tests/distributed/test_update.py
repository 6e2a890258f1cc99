"""One update is the same, however many processes make it, and equal to plain torch."""

import json
from pathlib import Path

import pytest

# fp32 sums in another order: some 1e-7 a step, which Adam's normalisation may amplify on near-zero gradients.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 2e-5


def records(output_dir: Path, event: str, rank: int = 0) -> list[dict]:
    lines = map(json.loads, (output_dir / f"record-{rank}.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def losses(output_dir: Path) -> list[float]:
    return [line["metrics"]["train/loss"] for line in records(output_dir, "step")]


def flat(weights: dict) -> list[float]:
    def walk(value):
        return [x for item in value for x in walk(item)] if isinstance(value, list) else [value]

    return [x for name in sorted(weights) for x in walk(weights[name])]


@pytest.fixture(scope="module")
def oracle(launch):
    return launch("oracle", world_size=1).check().results[0]


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory):
    """The same four steps on one, two and three ranks; after a warm-up, checkpointed, or without zero.Init."""
    found = {}
    for world_size in (1, 2, 3):
        folder = tmp_path_factory.mktemp("update") / str(world_size)
        outcome = launch(
            "train",
            world_size=world_size,
            output_dir=str(folder),
            warm_up=world_size > 1,
            construct=world_size != 3,
            is_checkpointed=world_size == 2,
        ).check()
        found[world_size] = (folder, outcome.results[0])
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_update_equals_plain_torch_adamw(runs, oracle, world_size):
    folder, result = runs[world_size]
    assert losses(folder) == pytest.approx(oracle["losses"], rel=LOSS_TOLERANCE)
    norms = [line["metrics"]["train/grad_norm"] for line in records(folder, "step")]
    assert norms == pytest.approx(oracle["norms"], rel=1e-5)
    assert min(norms) > 0.05, "clipping never acted; the test lost its point"
    assert flat(result["weights"]) == pytest.approx(flat(oracle["weights"]), abs=WEIGHT_TOLERANCE)


def test_all_ranks_report_the_same_and_count_every_sample_once(runs):
    folder, result = runs[2]
    first, second = (records(folder, "step", rank) for rank in (0, 1))
    for a, b in zip(first, second):
        # Throughput is measured on each rank's clock.
        for name in ("train/loss", "train/grad_norm", "train/learning_rate", "memory/max_reserved_gib", "data/skipped"):
            assert a["metrics"][name] == b["metrics"][name]
    assert result["state"]["num_samples"] == 6 + 6 + 5 + 6
    assert result["state"]["num_images"] == 7 + 7 + 6 + 7
    assert result["state"]["num_label_tokens"] == runs[1][1]["state"]["num_label_tokens"]


def test_skipped_samples_of_any_rank_reach_every_rank_in_their_step(runs):
    folder, _ = runs[2]
    for rank in (0, 1):
        skipped = [line["skipped"] for line in records(folder, "step", rank)]
        assert skipped == [{}, {"bad2.1": "cannot be decoded"}, {}, {}]
        assert [line["metrics"]["data/skipped"] for line in records(folder, "step", rank)] == [0, 1, 0, 0]


def test_metrics_have_the_names_users_know(runs):
    names = set(records(runs[1][0], "step")[0]["metrics"])
    assert names == {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "perf/samples_per_s_per_gpu",
        "perf/images_per_s_per_gpu",
        "perf/tokens_per_s_per_gpu",
        "perf/data_wait_frac",
        "perf/step_seconds",
        "memory/max_reserved_gib",
        "data/skipped",
    }


def test_replicated_frozen_tower_is_never_communicated_and_changes_nothing(launch, tmp_path, oracle):
    """The tower's 12 x 8 + 8 + 8 x 8 + 8 elements are gathered in each micro-batch when partitioned, else never."""
    results = {}
    for mode in ("partitioned", "replicated"):
        zero = {"frozen_towers": mode, "param_persistence_threshold": 0}
        outcome = launch(
            "train", world_size=2, output_dir=str(tmp_path / mode), frozen=["tower"], zero=zero, count_gathers=True
        )
        results[mode] = outcome.check().results[0]
    plain = launch("oracle", world_size=1, frozen=["tower"]).check().results[0]
    assert results["replicated"]["is_resident"] == [True] * 4  # not even a pointer moves per call
    assert results["partitioned"]["is_resident"] == [False] * 4
    assert losses(tmp_path / "partitioned") == losses(tmp_path / "replicated")
    assert results["partitioned"]["weights"] == results["replicated"]["weights"]
    assert losses(tmp_path / "replicated") == pytest.approx(plain["losses"], rel=LOSS_TOLERANCE)
    assert plain["losses"] != pytest.approx(oracle["losses"], rel=1e-4), "freezing changed nothing"
    num_micro_batches, tower = 4 * 2, 12 * 8 + 8 + 8 * 8 + 8
    difference = results["partitioned"]["gathered"] - results["replicated"]["gathered"]
    assert difference == num_micro_batches * tower


def test_evaluation_is_weighted_by_tokens_over_ranks(launch, tmp_path, oracle):
    found = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        launch("train", world_size=world_size, output_dir=str(folder), evaluate_every=2, total_steps=3).check()
        found[world_size] = [line["metrics"] for line in records(folder, "evaluate")]
    assert len(found[1]) == 2  # after step 2, and at the end
    assert losses(tmp_path / "1")[:2] == pytest.approx(oracle["losses"][:2], rel=LOSS_TOLERANCE)  # training goes on
    for one, two in zip(found[1], found[2]):
        assert one["eval/loss"] == pytest.approx(two["eval/loss"], rel=1e-5)
        assert one["eval/num_label_tokens"] == two["eval/num_label_tokens"] > 0


def test_optimizer_state_on_the_host_gives_the_same_update(launch, tmp_path, oracle):
    launch("train", world_size=2, output_dir=str(tmp_path), zero={"offload": "optimizer"}).check()
    assert losses(tmp_path) == pytest.approx(oracle["losses"], rel=LOSS_TOLERANCE)
