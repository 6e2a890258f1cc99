"""Tables as text and JSON; no time without a GPU; the command line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.kernels import figure, machine, report
from benchmarks.kernels.__main__ import _selection, app
from benchmarks.kernels.cases import Case
from benchmarks.kernels.floors import Rates
from benchmarks.kernels.run import Selection, cpu_cases, gpu_cases
from benchmarks.kernels.shapes import CONTEXTS, LEVELS, SHAPES, sweep

GPU_HEADER: dict[str, Any] = {
    "device": "cuda", "gpu": "NVIDIA Test", "memory_bytes": 141e9, "commit": "a" * 40, "settings_sha256": "b" * 64,
    "versions": {"torch": "2", "triton": "3"}, "cuda": "13", "smi": {"driver_version": "1"}, "capability": "9.0",
    "copy_bytes_per_second": 4.3e12, "matmul_flops_per_second": 790e12, "l2_bytes": 50 * 2**20,
}  # fmt: skip
RATES = Rates(flops=790e12, bytes=4.3e12)


def timing(median: float) -> dict[str, Any]:
    return {"median": median, "p20": median * 0.9, "p80": median * 1.1, "samples": 30, "reps": 20}


def timed_table(scale: float = 1.0, shape: str = "A") -> report.Table:
    table = report.new_table(Case("cross", SHAPES[shape], "others", True), rates=RATES)
    for name, family, match, ms in (
        ("loop", "loop", "ok", 2.0), ("sdpa", "library", "ok", 0.6), ("mixed", "library", "FAIL", 0.1),
        ("flash", "library", "absent", None), ("ours", "ours", "ok", 0.3),
    ):  # fmt: skip
        row: dict[str, Any] = {"name": name, "label": f"label {name}", "family": family, "match": match, "why": ""}
        if match == "ok" and ms is not None:
            row |= {which: timing(ms * scale) for which in ("forward", "backward", "both")}
            row |= {"peak_bytes": 5e8, "kernels_forward": 4, "kernels_backward": 9, "compile_seconds": 1.0}
        elif match == "FAIL":
            row["why"] = "output 0: RMS error 0.2"
        table["rows"].append(row)
    return table


def line(text: str, label: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(label))


def test_a_table_compares_with_the_fastest_correct_library_row_and_the_floor() -> None:
    text = report.table_text(timed_table(), has_gpu=True)
    assert "0.300 (0.270-0.330)" in line(text, "label ours")
    assert "2.00/2.00/2.00" in line(text, "label ours")
    assert "44/50/94" in line(text, "label ours"), "0.131 and 0.150 ms of 0.3; their sum of 0.3"
    assert "forward 93.0 GFLOP 200 MB 0.131 ms" in text and "4+9" in text
    assert line(text, "label loop").count("0.30/0.30/0.30") == 1


def test_a_failed_or_absent_row_has_a_reason_and_no_number() -> None:
    text = report.table_text(timed_table(), has_gpu=True)
    assert line(text, "label mixed").split() == ["label", "mixed", "FAIL", "output", "0:", "RMS", "error", "0.2"]
    assert line(text, "label flash").split() == ["label", "flash", "absent"]


def test_a_time_under_a_header_without_a_gpu_is_refused() -> None:
    with pytest.raises(report.TimesWithoutGpuError, match="a CPU's time is not a kernel's speed"):
        report.table_text(timed_table(), has_gpu=False)
    table = timed_table()
    table["rows"] = []  # the floor's milliseconds alone are refused too
    with pytest.raises(report.TimesWithoutGpuError):
        report.text(machine.header(torch.device("cpu"), rates=None), [table])


def test_the_worst_median_of_several_starts_counts_and_a_failure_stays_one() -> None:
    runs = [[timed_table(scale)] for scale in (1.0, 1.3, 1.1)]
    rows = {row["name"]: row for row in report.worst_of(runs)[0]["rows"]}
    assert rows["ours"]["both"]["median"] == pytest.approx(0.39) and rows["ours"]["restarts"] == 3
    failing = copy.deepcopy(runs)
    next(r for r in failing[2][0]["rows"] if r["name"] == "ours")["match"] = "FAIL"
    assert {r["name"]: r["match"] for r in report.worst_of(failing)[0]["rows"]}["ours"] == "FAIL"


def test_parts_of_a_run_are_joined_and_newer_tables_win() -> None:
    joined = report.merged([timed_table(1.0), timed_table(1.0, "B")], [timed_table(2.0)])
    assert [t["shape"] for t in joined] == ["A", "B"]
    assert joined[0]["rows"][0]["both"]["median"] == 4.0


def test_files_are_json_text_and_a_figure(tmp_path: Path) -> None:
    tables = [timed_table()]
    for shape in sweep():
        table = report.new_table(Case("qformer", shape, "others", False, "shared"), rates=RATES)
        table["rows"] = timed_table()["rows"]
        tables.append(table)
    report.write(tmp_path / "x.json", GPU_HEADER, tables, notes=["a note"])
    assert json.loads((tmp_path / "x.json").read_text())["tables"][0]["level"] == "cross"
    text = (tmp_path / "x.txt").read_text()
    assert text.startswith("NVIDIA Test 141 GB | driver 1") and "a note" in text
    assert "copy 4.30 TB/s, matmul 790 TFLOP/s, both measured in this run" in text
    assert figure.draw(tmp_path / "x.png", GPU_HEADER, tables) and (tmp_path / "x.png").stat().st_size > 5000
    assert not figure.draw(tmp_path / "none.png", GPU_HEADER, [timed_table()])


def test_the_header_without_a_gpu_says_so_first() -> None:
    lines = machine.headline(machine.header(torch.device("cpu"), rates=None))
    assert lines[0] == "NO GPU: this machine has none, and no GPU has run what follows."


def test_the_settings_of_our_kernels_are_printed() -> None:
    text = machine.setting_text(SHAPES["A"], torch.device("cpu"), torch.bfloat16, trained=True)
    assert text.count(" / ") == 2 and text.startswith("IB")


def test_a_gpu_run_holds_every_shape_level_context_and_mode() -> None:
    cases = gpu_cases(Selection())
    assert len({case.key for case in cases}) == len(cases)
    for level in LEVELS:
        for shape in SHAPES:
            for context in CONTEXTS:
                modes = {c.trained for c in cases if (c.level, c.shape.name, c.context) == (level, shape, context)}
                assert modes == ({False} if level == "mix" else {False, True})
    assert any(case.logit_sd == 5.0 for case in cases)
    assert {c.structure for c in cases if c.level == "qformer"} == {"found", "shared"}


def test_selections_narrow_a_run() -> None:
    selection = _selection(["A", "N"], ["cross", "qformer"], ["others", "frozen"], [], quick=False)
    for case in gpu_cases(selection) + cpu_cases(selection):
        assert case.shape.name[0] in "AN" and case.context == "others" and not case.trained
    assert {c.shape.name[0] for c in gpu_cases(selection)} == {"A", "N"}


@pytest.mark.parametrize(
    "arguments", [["--shape", "Z"], ["--level", "qformers"], ["--mode", "both"], ["--only", "our"]]
)
def test_a_wrong_choice_is_refused_with_what_there_is(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "choose from" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu_says_so_and_prints_no_time(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    result = CliRunner().invoke(
        app, ["--shape", "A", "--level", "op", "--mode", "all", "--only", "sdpa", "--only", "mixed", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    content, text = json.loads(out.read_text()), out.with_suffix(".txt").read_text()
    assert text.startswith("NO GPU") and content["header"]["gpu"] is None
    assert " ms" not in text and "seconds" not in text
    rows = [row for table in content["tables"] for row in table["rows"]]
    assert [row["match"] for row in rows] == ["ok"] * 4 and all(row["launches_forward"] > 0 for row in rows)
    assert not any(row.get(key) for row in rows for key in report.TIME_KEYS)
