"""Settings compiled for Ampere and Hopper without a GPU: no spills, shared memory within limits, tensor cores in use.

Compiling happens in a process of its own: this one runs Triton's interpreter.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from samtrain_kernels import testing
from samtrain_kernels.aot import SHARED_MEMORY_LIMIT, AotReport, aot_cases, compile_case, source_digest
from samtrain_kernels.dispatch import is_interpreted
from samtrain_kernels.settings import (
    CONTEXT_KERNELS,
    DEFAULT_CAPABILITIES,
    PATCH_KERNELS,
    SEARCH_SPACES,
    PatchSetting,
    capability_of,
    load,
    settings_files,
)

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "aot.json"
KERNELS = CONTEXT_KERNELS + PATCH_KERNELS
REFRESH = "run: python -m benchmarks.aot --search --grid context_forward --processes 2"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


in_compiler = partial(testing.in_compiler, folder=ROOT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_shipped_settings_compile_without_spills_and_use_tensor_cores(kernel: str) -> None:
    """Every bfloat16 setting for the Q-Former's head width (64), for both chips, compiled here and now."""
    rows = in_compiler(f"""
import json
from benchmarks.aot import compile_job, shipped_jobs
from dataclasses import replace
jobs = [j for j in shipped_jobs() if j.kernel == {kernel!r} and j.dtype == "bfloat16" and j.head_dim in (64, None)]
print(json.dumps([row for job in jobs for row in compile_job(replace(job, all_variants=False))]))
""")
    assert {tuple(row["capability"]) for row in rows} >= set(DEFAULT_CAPABILITIES)
    for row in rows:
        assert row["problems"] == [], row
        assert row["registers"] > 0, row
        if kernel in CONTEXT_KERNELS:
            assert row["mma_sync"] + row["wgmma"] > 0 and row["async_copies"] > 0, row
        if kernel == "patch_logits":
            assert row["async_copies"] > 0, row  # the read of F is pipelined


def test_the_gate_sees_a_real_spill() -> None:
    """A tile far too large for one warp."""
    (row,) = in_compiler("""
import json
from benchmarks.aot import Job, compile_job
from samtrain_kernels.settings import PatchSetting
print(json.dumps(compile_job(Job("patch_logits", PatchSetting(32, 512, 1, 1), None, "float32", (8, 0)))))
""")
    assert row["spill_loads"] > 0 and any("spills registers" in problem for problem in row["problems"]), row


def test_the_committed_table_covers_every_shipped_setting(table: dict[str, Any]) -> None:
    rows = [
        (row["kernel"], row["setting"], row["dtype"], row["head_dim"], row["capability"]) for row in table["shipped"]
    ]
    for path in settings_files():
        for row in load(path):
            key = (row.kernel, asdict(row.setting), row.dtype, row.head_dim, list(capability_of(path)))
            assert key in rows, f"{path.name}: {key} was never compiled; {REFRESH}"
    assert [row for row in table["shipped"] if row["problems"]] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_search_space_holds_nothing_that_the_compiler_speaks_against(kernel: str, table: dict[str, Any]) -> None:
    rows = [row for row in table["search"] if row["kernel"] == kernel]
    for capability in DEFAULT_CAPABILITIES:
        for setting in SEARCH_SPACES[capability][kernel]:
            found = [r for r in rows if r["setting"] == asdict(setting) and r["capability"] == list(capability)]
            assert found, f"{setting} was never compiled for {capability}; {REFRESH}"
            assert [row["problems"] for row in found if row["problems"]] == [], (setting, capability)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_committed_table_is_of_this_code(kernel: str, table: dict[str, Any]) -> None:
    assert table["sources"][kernel] == source_digest(kernel), f"the kernel's code changed since; {REFRESH}"


def test_the_table_says_what_it_is(table: dict[str, Any]) -> None:
    text = TABLE.with_suffix(".txt").read_text(encoding="utf-8")
    for part in (table["triton"], table["commit"][:12], "No GPU has run any of it", "pruned: spills registers"):
        assert part in text


REPORT = AotReport(
    kernel="context_forward", variant="", setting={}, head_dim=64, dtype="bfloat16", capability=(8, 0), registers=128,
    spill_loads=0, spill_stores=0, shared_bytes=16384, mma_sync=32, wgmma=0, async_copies=20,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes,problem",
    [
        ({}, None),
        ({"spill_loads": 1}, "spills registers (1 loads, 0 stores)"),
        ({"spill_stores": 2}, "spills registers (0 loads, 2 stores)"),
        ({"spill_stores": 2, "dtype": "float32"}, None),
        ({"spill_stores": 2, "dtype": "float32", "kernel": "patch_logits"}, "spills registers (0 loads, 2 stores)"),
        ({"shared_bytes": 163 * 1024}, None),
        ({"shared_bytes": 163 * 1024 + 1}, "needs 166913 bytes of shared memory, the chip has 166912"),
        ({"shared_bytes": 163 * 1024 + 1, "capability": (9, 0)}, None),
        ({"mma_sync": 0}, "uses no tensor core"),
        ({"mma_sync": 0, "wgmma": 8}, None),
        ({"mma_sync": 0, "dtype": "float32"}, None),
        ({"mma_sync": 0, "kernel": "patch_logits"}, None),
    ],
)
def test_what_speaks_against_a_setting(changes: dict[str, Any], problem: str | None) -> None:
    assert replace(REPORT, **changes).problems() == ([problem] if problem else [])
    assert set(SHARED_MEMORY_LIMIT) == set(DEFAULT_CAPABILITIES)


def test_the_interpreter_compiles_nothing_and_says_so() -> None:
    if not is_interpreted():
        pytest.skip("this process compiles")
    (case,) = aot_cases("patch_logits", PatchSetting(8, 128, 4, 1), head_dim=None, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_case(case, capability=(9, 0), head_dim=None, dtype=torch.bfloat16)
