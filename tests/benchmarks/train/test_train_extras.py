"""What is looked at in ours alone: the loader at work, a checkpoint, a first step from files, counts. No times here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.golden_loss import GoldenStep, first_difference, golden_shape, small, trajectory
from benchmarks.train import first_step
from benchmarks.train.checkpoint_stall import save_while_training
from benchmarks.train.counts import LiveBytes, count_step
from benchmarks.train.data_wait import data_wait, write_set
from benchmarks.train.loops import ROWS, OurLoop, Setting
from benchmarks.train.measure import active
from benchmarks.train.samples import draw_step
from benchmarks.train.shapes import SHAPES

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
    with LiveBytes() as live:
        ours.gradients()
    ours.release()
    assert counted.weights == sum(p.numel() * 4 for p in ours.module.parameters())
    activations = counted.peak - counted.weights - counted.optimizer
    assert live.peak == pytest.approx(activations, rel=0.25)  # copies of the batch, and masks, on one side only
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
