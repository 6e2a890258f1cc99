"""A training step compiles for a GPU that is not there, with all that a GPU alone runs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from samtrain_kernels.testing import in_compiler
from typer.testing import CliRunner

from benchmarks.train import aot

ROOT = Path(__file__).resolve().parents[3]
needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler is installed"
)


@needs_a_compiler
def test_a_step_compiles_for_hopper_and_later_packs_compile_nothing() -> None:
    table = in_compiler(
        """
import json
from benchmarks.train.aot import compile_step
from benchmarks.train.shapes import SHAPES
packs = [(0, 1, 2), (3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3), (7, 6, 5, 0, 3, 2, 1)]
print(json.dumps(compile_step(SHAPES["tiny"], "frozen", (9, 0), packs=packs)))
""",
        folder=ROOT,
    )
    assert table["attention"] == "flex_attention"
    names = {row["name"] for row in table["kernels"]}
    for part in (
        "tem_fused_flex_attention", "flex_attention_backward", "fused_native_layer_norm", "fused_gelu",
        "_rms_norm_forward", "_rms_norm_backward", "_swiglu_forward", "_swiglu_backward", "_triton_rope",
    ):  # fmt: skip
        assert any(part in name for name in names), f"{part} is not among {sorted(names)}"
    assert aot.unlaunchable(table) == []
    assert all(row["code"]["registers"] > 0 for row in table["kernels"])
    packs = table["micro_batches"]
    # A second length makes shapes dynamic; after that nothing is compiled for any pack of more than one block of 128.
    assert min(pack["tokens"] for pack in packs) > 128 and len({pack["tokens"] // 128 for pack in packs}) >= 2
    assert packs[0]["inductor"] > 0 and [pack["inductor"] for pack in packs[2:]] == [0] * (len(packs) - 2)


@needs_a_compiler
def test_what_needs_a_value_from_the_device_fails() -> None:
    assert in_compiler(
        """
import json, torch
from benchmarks.absent_gpu import compiling_for
with compiling_for((8, 0)) as kernels:
    x = torch.ones(4, 4, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda t: torch.nn.functional.gelu(t) * 2)
    compiled(x).sum().backward()
    assert x.grad.device.type == "cuda" and x.grad.shape == (4, 4)
    try:
        x.sum().item()
    except Exception as error:
        print(json.dumps([type(error).__name__, [k.name for k in kernels]]))
""",
        folder=ROOT,
    ) == ["DataDependentOutputException", ["triton_poi_fused_gelu_mul_0", "triton_poi_fused_gelu_gelu_backward_mul_0"]]


def test_a_kernel_without_a_setting_that_fits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, problem: str | None) -> dict[str, Any]:
        code = {"registers": 8, "spill_loads": 0, "spill_stores": 0}
        return {
            "name": name, "by": "inductor", "times": 1, "num_warps": 4, "num_stages": 1, "shared_bytes": 2**18,
            "code": code, "problem": problem,
        }  # fmt: skip

    kernels = [row("one fits", "too much"), row("one fits", None), row("none fits", "262144 bytes of shared memory")]
    table = {
        "shape": "7b", "train": "frozen", "capability": [9, 0], "data": "some", "attention": "flex_attention",
        "micro_batches": [{"tokens": 9, "inductor": 3, "triton": 0}], "kernels": kernels,
    }  # fmt: skip
    assert aot.unlaunchable(table) == ["none fits"]
    monkeypatch.setattr(aot, "in_a_process", lambda job: table)
    done = CliRunner().invoke(aot.app, ["--job", "7b/frozen/90", "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 1 and "none fits" in done.output
    text = (tmp_path / "x.txt").read_text()
    assert "No GPU has run any of it" in text and "262144 bytes" in text
    assert json.loads((tmp_path / "x.json").read_text())["tables"] == [table]


@pytest.mark.parametrize("job", ["7b/frozen", "7b/some/90", "70b/frozen/90", "7b/frozen/75"])
def test_an_unknown_job_says_what_there_is(job: str) -> None:
    done = CliRunner().invoke(aot.app, ["--job", job])
    assert done.exit_code == 2 and "frozen, lora, full" in " ".join(done.output.replace("│", " ").split())
