"""The tuner with a counter in the clock's place, kernels in the interpreter: toy shapes, float32."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samtrain_kernels import settings
from samtrain_kernels.settings import SEARCH_SPACE, SEARCH_SPACES, KernelSetting, PatchSetting
from typer.testing import CliRunner

from benchmarks import tune
from benchmarks.kernels.shapes import SHAPES, reduced
from benchmarks.tune import Candidate, Problem

SHAPE = replace(reduced(SHAPES["D"]), heads=1, patches=5, feature_width=16)
CPU = torch.device("cpu")


class Clock:
    """Every interval is longer than the one before."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def mark(self) -> int:
        return next(self.ticks) ** 2

    def milliseconds(self, start: int, end: int) -> float:
        return float(end - start)


def tuned(kernel: str, space: tuple[Any, ...]) -> list[Candidate]:
    return tune.tune(
        shape=SHAPE, device=CPU, dtype=torch.float32, timer=Clock(), kernels=(kernel,), images={"1-2": 2},
        num_sets=1, say=lambda line: None, space={kernel: space},
    )  # fmt: skip


@pytest.mark.parametrize("kernel", ["context_forward", "context_backward", "context_kv_grad"])
def test_settings_of_context_kernels_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    if kernel != "context_forward":  # one mode is enough to see the tuner work, and the interpreter is slow
        monkeypatch.setattr(tune, "MODES", tune.MODES[:1])
    found = tuned(kernel, (KernelSetting(2 if kernel == "context_forward" else 1, 16, 4, 2),))
    assert [(c.why, c.images) for c in found] == [("", "1-2")]
    assert all(c.milliseconds is not None and c.errors for c in found)
    assert tune.winners(found) == [min(found, key=lambda c: c.milliseconds or 0.0)]


@pytest.mark.parametrize("kernel", ["patch_logits", "patch_logits_grad"])
def test_settings_of_patch_kernels_are_checked_and_timed(kernel: str) -> None:
    found = tuned(kernel, (PatchSetting(4, 16, 4, 1),))
    assert [(c.why, c.images) for c in found] == [("", "any")] and found[0].milliseconds is not None


def test_a_wrong_setting_is_never_timed_and_never_wins() -> None:
    good, bad, broken = (Candidate("context_forward", "1-2", KernelSetting(i, 32, 4, 2)) for i in (1, 2, 4))
    exact = torch.randn(4, dtype=torch.float64)

    def run(setting: KernelSetting) -> dict[str, torch.Tensor]:
        if setting.images_per_block == 4:
            raise RuntimeError("out of resource: shared memory")
        return {"output": exact * (1.01 if setting.images_per_block == 2 else 1.0)}

    problem = Problem(run, {"output": exact}, {"output": "output"})
    for candidate in (good, bad, broken):
        tune.check(candidate, [problem], torch.float32)
    assert "RMS error" in bad.why and "out of resource" in broken.why and not good.why
    tune.time_candidates([bad, good, broken], [problem], Clock(), samples=3)
    assert bad.milliseconds is None and tune.winners([bad, good, broken]) == [good]
    with pytest.raises(RuntimeError, match="no setting is right"):
        tune.winners([bad, broken])


def test_the_written_files_are_read_by_the_kernels(tmp_path: Path) -> None:
    best = [
        Candidate("context_forward", "1-2", KernelSetting(2, 64, 4, 2), milliseconds=1.0),
        Candidate("context_forward", "7+", KernelSetting(1, 64, 4, 2), milliseconds=1.0),
        Candidate("patch_logits", "any", PatchSetting(8, 256, 4, 2), milliseconds=1.0),
    ]
    measured = {"gpu": "NVIDIA H200", "commit": "abc", "capability": [9, 0]}
    paths = tune.write(best, tmp_path, gpu="NVIDIA H200", dtype="bfloat16", head_dim=64, measured=measured)
    assert [str(p.relative_to(tmp_path)) for p in paths] == [
        "context_attention/configs/nvidia_h200.json", "image_mix/configs/nvidia_h200.json",
    ]  # fmt: skip
    rows = settings.load(paths[0])
    assert [(row.images, row.setting) for row in rows] == [(c.images, c.setting) for c in best[:2]]
    assert json.loads(paths[1].read_text())["measured"]["commit"] == "abc"


def test_a_chip_tries_what_its_compiler_did_not_spill() -> None:
    assert tune.search_space((9, 0)) == SEARCH_SPACES[9, 0] and tune.search_space((8, 6)) == SEARCH_SPACES[8, 0]
    assert tune.search_space((12, 0)) == SEARCH_SPACES[max(SEARCH_SPACES)] and tune.search_space((7, 5)) == SEARCH_SPACE


def test_every_bucket_of_images_is_tuned() -> None:
    assert all(settings.bucket_of(n) == name for name, n in tune.IMAGES.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do_and_exits_2() -> None:
    result = CliRunner().invoke(tune.app, [])
    assert result.exit_code == 2
    assert "python -m benchmarks.tune" in result.output and "commit the files" in result.output
