"""What is looked at in ours alone: the loader at work, a checkpoint, a first step from files, counts. No times here."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.golden_loss import GoldenStep, first_difference, golden_shape, small, trajectory
from benchmarks.train import first_step
from benchmarks.train.checkpoint_stall import save_while_training
from benchmarks.train.counts import count_step
from benchmarks.train.data_wait import data_wait, write_set
from benchmarks.train.loops import ROWS, OurLoop, Setting
from benchmarks.train.measure import active
from benchmarks.train.report import table_text
from benchmarks.train.run import DEFAULT_PEERS, EXTRAS, Selection, run_on_gpu
from benchmarks.train.samples import draw_step
from benchmarks.train.shapes import SHAPES
from samtrain.model.live_bytes import LiveBytes

TINY, CPU = SHAPES["tiny"], torch.device("cpu")


@pytest.fixture(scope="module")
def ours() -> OurLoop:
    data = draw_step(TINY, text="mini", samples=4, max_images=16)
    loop = ROWS["ours"].make(Setting(TINY, "frozen", torch.float32, CPU), data, None)
    assert isinstance(loop, OurLoop)
    return loop


def test_steps_come_from_real_shards_through_the_loader(ours: OurLoop, tmp_path: Path) -> None:
    write_set(tmp_path, text="mini", samples=8)
    with active(ours):
        found = data_wait(ours, tmp_path, samples=4, steps=1, num_workers=1, max_images=16)
    assert (found["samples"], found["skipped"]) == (4, 0)


def test_the_trainers_checkpointer_saves_the_plain_engine_while_it_trains_on(ours: OurLoop, tmp_path: Path) -> None:
    with active(ours):
        ours.step()
        before = {n: p.detach().clone() for n, p in ours.module.named_parameters() if p.requires_grad}
        found = save_while_training(ours, tmp_path)
        after = dict(ours.module.named_parameters())
    saved = load_file(tmp_path / "checkpoint-1" / "fragments-00000.safetensors")
    # What is on disk is the state at the beginning, not what the steps beside it made of it.
    for name, value in before.items():
        assert torch.equal(saved[f"{name}/master"], value.flatten())
    assert found["steps_beside"] >= 1 and any(not torch.equal(after[n], v) for n, v in before.items())
    assert found["bytes"] > 12 * sum(value.numel() for value in before.values())
    assert 0 <= found["stall_seconds"] <= found["seconds"]


def test_a_first_step_is_made_from_weights_in_files(ours: OurLoop, tmp_path: Path) -> None:
    first_step.write_weights(ours.module, tmp_path)
    stages, loss = first_step.run(
        shape="tiny", train="frozen", weights=str(tmp_path), text="mini", samples=4, max_images=16,
        checkpointing=False, device="cpu", dtype="float32",
    )  # fmt: skip
    assert list(stages) == ["imports", "construction", "weights", "engine and data", "first step"]
    assert 3.0 < loss < 7.0


def test_counts_of_fake_tensors_are_those_of_real_ones(ours: OurLoop) -> None:
    counted = count_step(ROWS["ours"], ours.setting, ours.data)
    with LiveBytes(given=[*ours.module.parameters(), *ours.module.buffers()]) as live:
        ours.gradients()
    ours.release()
    assert counted.weights == sum(p.numel() * 4 for p in ours.module.parameters())
    activations = counted.peak - counted.weights - counted.optimizer
    assert live.peak == pytest.approx(activations, rel=0.05)  # views of the batch count on one side only
    assert counted.num_padded_tokens == ours.data.num_tokens


def test_golden_steps_repeat_and_another_seed_parts_from_them() -> None:
    from benchmarks.golden_loss import RECIPE, load_recipe

    recipe = load_recipe(RECIPE)
    shape = small(golden_shape(recipe))

    def run(seed: int) -> list[GoldenStep]:
        chosen = recipe.model_copy(update={"seed": seed})
        return list(trajectory(chosen, steps=2, precision="fp32", device=CPU, shape=shape))

    first = run(42)
    assert first_difference(run(42), first, precision="fp32") is None
    assert first_difference(run(43), first, precision="fp32") is not None
    assert first_difference([GoldenStep(float("nan"), 1.0)], first, precision="fp32") is not None


def test_the_benchmark_runs_without_the_libraries_it_does_not_use(tmp_path: Path) -> None:
    """A GPU's image may lack them."""
    absent = (
        "deepspeed", "ray", "mlflow", "webdataset", "simplejpeg", "liger_kernel", "rouge", "pycocoevalcap", "gguf",
        "matplotlib", "aiohttp",
    )  # fmt: skip
    code = f"""
import sys
for name in {absent!r}: sys.modules[name] = None
import benchmarks.gpu, benchmarks.golden_loss, benchmarks.tune, benchmarks.train.checkpoint_stall
import benchmarks.train.counts, benchmarks.train.first_step, benchmarks.train.reference
from benchmarks.train.__main__ import app
sys.argv = ["train", "--shape", "tiny", "--train", "lora", "--no-counts", "--out", {str(tmp_path / "t.json")!r}]
app()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "t.json").read_text())["tables"][0]
    match = {row["name"]: row["match"] for row in table["rows"]}
    assert match.pop("ours_zero") == "absent" and set(match.values()) == {"ok"}


class Ticks:
    def mark(self) -> float:
        return 0.0

    def milliseconds(self, start: float, end: float) -> float:
        return 2.0


def test_all_that_a_gpu_would_be_asked_runs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal of the GPU's table on a CPU: rows, gate, breakdown and extras, with a clock that measures nothing."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the benchmark itself runs here")
    monkeypatch.setattr("benchmarks.train.measure.EventTimer", Ticks)
    parts = ("ours_dense", "ours_no_liger", "ours_eager_vision", "ours_materialised")
    peers = (*(name for name in DEFAULT_PEERS if name != "ours_zero"), *parts)
    selection = Selection(
        replace(TINY, samples=4), "lora", peers=peers, rounds=1, steps=1, extras=EXTRAS, num_workers=1
    )
    said: list[str] = []
    table = run_on_gpu(selection, said.append, memory_bytes=2**34, device=CPU)
    for row in table["rows"]:
        assert row["match"] == "ok" and row["step"]["median"] == 2.0 and "status" not in row, row
        assert set(row["breakdown"]["parts"]) >= {"vision", "qformer", "llm", "update"}, row
    assert set(table["extras"]) == set(EXTRAS), said
    for name, found in table["extras"].items():
        assert "error" not in found and "absent" not in found, f"{name}: {found}"
    header = {"gpu": "none: a rehearsal", "memory_bytes": 2**34, "smi": {}, "cuda": "", "peak_tflops": 1.0}
    header |= {"peak_source": "", "matmul_flops_per_second": 1e12, "commit": "0" * 40}
    header["versions"] = dict.fromkeys(("torch", "triton", "transformers", "deepspeed"), "0")
    text = table_text(table, header)
    assert all(row["label"] in text for row in table["rows"]) and "first step after" in text
