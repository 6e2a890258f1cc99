"""The study on a toy recipe: its rows add up, and it says where scaling ends."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling.network import Network
from benchmarks.scaling.parts import PartSeconds, measured, predicted
from benchmarks.scaling.recipes import Recipe, Workload, parameters_of
from benchmarks.scaling.report import draw, whole_text, write
from benchmarks.scaling.study import STRATEGIES, Assumptions, step_row, stops_at, study
from benchmarks.train.shapes import SHAPES

SECONDS = PartSeconds({"vision": 0.5, "qformer": 0.5, "language_model": 0.5}, 1e9, "made up by a test")
ASSUMPTIONS = Assumptions(Network(), SECONDS)
RECIPE = Recipe(SHAPES["tiny"], "frozen", checkpointing=False)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload(RECIPE, text="mini")


def test_every_sample_is_computed_once_whatever_the_number_of_gpus(workload: Workload) -> None:
    totals = [
        sum(work.total for works in workload.rounds(samples=48, world_size=world) for work in works)
        for world in (1, 3, 8)
    ]
    assert totals[0] == pytest.approx(totals[1]) == pytest.approx(totals[2])


def test_a_step_lasts_as_long_as_its_slowest_ranks_where_nothing_is_moved(workload: Workload) -> None:
    free = replace(ASSUMPTIONS, network=Network(nvlink=1e30, card=1e30, base=0.0, latency_inside=0, latency_between=0))
    rounds = workload.rounds(samples=32, world_size=8)
    row = step_row(RECIPE, STRATEGIES["partitioned"], parameters_of(RECIPE), rounds, free, world_size=8)
    parts = ("vision", "qformer", "language_model")
    slowest = sum(max(getattr(w, part) for w in works) for works in rounds for part in parts) / 0.5e9
    assert row["step_seconds"] == pytest.approx(slowest, rel=1e-6)
    mean = sum(w.total for works in rounds for w in works) / 8 / 0.5e9
    assert row["imbalance"] == pytest.approx((slowest - mean) / slowest, rel=1e-6)
    assert row["mfu"] == pytest.approx(0.5 * mean / slowest, rel=1e-6)


def test_a_slow_network_ends_scaling_and_replicated_weights_go_on(
    workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.scaling.study.PERSISTENCE_THRESHOLD", 100)  # the toy's parameters are small
    slow = replace(ASSUMPTIONS, network=Network(latency_between=0.5))
    rows = study(RECIPE, workload, slow, strategies=("partitioned", "replicated"), world_sizes=(8, 16, 32))
    by_strategy = {s: [r for r in rows if r["strategy"] == s] for s in ("partitioned", "replicated")}
    assert stops_at(by_strategy["partitioned"]) == 16
    last = {s: own[-1]["exposed_communication"] for s, own in by_strategy.items()}
    assert last["partitioned"] > last["replicated"]
    header = {"commit": "0" * 40}
    given = {RECIPE.name: slow}
    write(tmp_path / "scaling.json", header, given, rows, text="a test's")
    text = (tmp_path / "scaling.txt").read_text()
    assert text.startswith("COMPUTED, NOT MEASURED") and "made up by a test" in text
    assert "partitioned: 16 GPUs" in text and whole_text(header, given, rows, text="a test's") + "\n" == text
    draw(tmp_path / "scaling.png", rows)
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_measured_parts_take_the_place_of_predicted_ones(tmp_path: Path) -> None:
    ours = {
        "name": "ours",
        "work": {"vision": 1e12, "qformer": 2e12, "llm": 3e12, "head": 1e12},
        "breakdown": {"parts": {"vision": 10, "qformer": 20, "llm": 30, "head": 5, "loss": 3, "other": 2, "update": 1}},
    }
    table = {
        "shape": "7b",
        "train": "frozen",
        "text": "mini",
        "context": "others",
        "checkpointing": False,
        "rows": [ours],
    }
    counted = table | {"train": "lora", "rows": [{"name": "ours", "work": {}}]}
    recomputed = table | {"train": "full", "checkpointing": True}
    header = {"peak_tflops": 1000, "gpu": "a GPU", "commit": "0" * 40}
    gpu, cpu = tmp_path / "train-gpu.json", tmp_path / "train-cpu.json"
    gpu.write_text(json.dumps({"header": header, "tables": [table, counted, recomputed]}))
    cpu.write_text(json.dumps({"header": header | {"gpu": None}, "tables": [table | {"shape": "13b"}]}))
    found = measured([gpu, cpu])
    assert list(found) == [("7b", "frozen"), ("7b", "full")]
    # Recomputation is a third more work of the LLM, which the study adds: the hardware did more than the MFU says.
    assert found["7b", "full"].mfu["language_model"] == pytest.approx(0.1 * 4 / 3)
    seconds = found["7b", "frozen"]
    assert seconds.mfu == pytest.approx({"vision": 0.1, "qformer": 0.1, "language_model": 0.1})
    assert seconds.is_measured and "measured on a GPU" in seconds.describe()
    assert "PREDICTED" in predicted().describe() and not predicted().is_measured
    assert predicted().of("language_model", 790e12 * 0.7) == pytest.approx(1.0)
