"""Tables of steps: figures, rows without figures, and no time without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels.report import TimesWithoutGpuError
from benchmarks.train import measure, report
from benchmarks.train.lengths import draw, read
from benchmarks.train.loops import ROWS, Loop, Setting
from benchmarks.train.samples import draw_step
from benchmarks.train.shapes import SHAPES

VERSIONS = dict.fromkeys(("torch", "triton", "transformers", "deepspeed"), "1")
NO_GPU: dict[str, Any] = {"gpu": None, "versions": VERSIONS, "commit": "0" * 40}
GPU: dict[str, Any] = NO_GPU | {
    "gpu": "a GPU", "memory_bytes": 1e11, "smi": {}, "cuda": "13", "peak_tflops": 1000.0, "peak_source": "a test",
    "matmul_flops_per_second": 8e14,
}  # fmt: skip


def row(name: str, milliseconds: float | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "label": name, "family": "ours", "match": "ok", "why": ""}
    found["work"] = {"vision": 1e12, "qformer": 1e12, "llm": 7e12, "head": 1e12}
    if milliseconds is not None:
        found["step"] = {"median": milliseconds, "p20": milliseconds, "p80": milliseconds, "samples": 6, "reps": 5}
        found |= {"peak_bytes": 2**34, "num_padded_tokens": 1250}
    return found | more


def table(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    data = {"description": "some", "samples": 64, "images": 200, "tokens": 1000, "labels": 9, "packs": [64]}
    return {
        "shape": "7b", "note": "a shape", "train": "frozen", "text": "mini", "context": "others", "layers": [11, 11],
        "checkpointing": False, "compared": "peers",
        "data": data, "parameters": {"all": 8e9, "trainable": 1e6}, "rows": list(rows), **more,
    }  # fmt: skip


def test_speeds_ratios_and_utilisation_of_a_gpu_table() -> None:
    text = report.table_text(
        table(row("ours", 20.0), row("reference", 60.0), row("instructblip", match="ok", status="out of memory")), GPU
    )
    ours = next(line for line in text.splitlines() if line.startswith("ours")).split()
    assert ours[2:5] == ["3200.0", "10000.0", "50000"] and "50.0" in ours  # 10 TFLOP in 20 ms of 1000 TFLOP/s
    assert "3.00" in ours and "-" in ours and "80" in ours and "16.0" in ours
    assert "out of memory" in text


def test_a_time_without_a_gpu_is_refused(tmp_path: Path) -> None:
    for wrong in (
        table(row("ours", 20.0)),
        table(row("ours"), extras={"data": {}}),
        table(row("ours", breakdown={1: 1})),
    ):
        with pytest.raises(TimesWithoutGpuError):
            report.write(tmp_path / "x.json", NO_GPU, [wrong])
    assert not (tmp_path / "x.json").exists()
    report.write(tmp_path / "x.json", NO_GPU, [table(row("ours"))])
    assert (tmp_path / "x.txt").read_text().startswith("NO GPU")


def test_newer_tables_take_the_place_of_older_ones_of_the_same_setting() -> None:
    old, new = table(row("ours", 20.0)), table(row("ours", 10.0))
    other = table(row("ours", 5.0), train="full")
    assert report.merged([old, other], [new]) == [new, other]


def test_lengths_are_the_real_sets_and_the_same_every_time() -> None:
    assert sum(r[4] for r in read()["rows"]) == 4000
    assert draw("mini", 50, seed=3) == draw("mini", 50, seed=3) != draw("mini", 50, seed=4)
    assert {one.images for one in draw("mini", 200, seed=0)} == {2, 3, 4, 5}


class ALoop:
    """Fails where a test says so."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.setting = Setting(SHAPES["tiny"], "frozen", torch.float32, torch.device("cpu"))
        self.fails_at, self.steps, self.seen = fails_at, 0, []

    def activate(self) -> None:
        self.seen.append("activate")

    def release(self) -> None:
        self.seen.append("release")

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. More words")


def test_a_row_that_raises_is_an_error_of_its_own_and_the_others_are_timed() -> None:
    class Broken(ALoop):
        def step(self) -> None:
            raise RuntimeError("no kernel image\nis available")

    loops: dict[str, Any] = {"broken": Broken(), "good": ALoop()}
    found = measure.measure_rows(loops, rounds=2, steps=1, timer=Ticks())
    assert found["broken"] == {"status": "error", "why": "RuntimeError: no kernel image"}
    assert found["good"]["step"]["samples"] == 2


class Ticks:
    def __init__(self) -> None:
        self.count = 0

    def mark(self) -> int:
        self.count += 10
        return self.count

    def milliseconds(self, start: int, end: int) -> float:
        return float(end - start)


def test_rows_take_turns_and_one_out_of_memory_leaves_the_others_alone() -> None:
    good, bad = ALoop(), ALoop(fails_at=5)
    loops: dict[str, Any] = {"good": good, "bad": bad}
    found = measure.measure_rows(loops, rounds=3, steps=2, timer=Ticks())
    assert found["good"]["step"]["median"] == 5.0 and good.steps == 3 * (1 + 2)
    assert found["bad"] == {"status": "out of memory", "why": "CUDA out of memory"}
    assert bad.seen == ["activate", "release"] * 2 and bad.steps == 5


def test_rounds_end_when_the_time_is_used_up_and_one_always_runs() -> None:
    def rounds_of(seconds: float) -> int:
        now = iter(range(0, 1000, 10))  # every look is ten seconds after the one before: a round takes ten
        loops: dict[str, Any] = {"good": ALoop()}
        found = measure.measure_rows(
            loops, rounds=6, steps=1, seconds=seconds, timer=Ticks(), clock=lambda: float(next(now))
        )
        return found["good"]["step"]["samples"]

    assert [rounds_of(seconds) for seconds in (1.0, 45.0, 1000.0)] == [1, 2, 6]


def test_times_are_refused_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    loop = ROWS["ours"].make(
        Setting(SHAPES["tiny"], "frozen", torch.float32, torch.device("cpu")),
        draw_step(SHAPES["tiny"], text="mini", samples=2, max_images=16),
        None,
    )
    assert isinstance(loop, Loop)
    with pytest.raises(RuntimeError, match="GPU"):
        measure.measure_rows({"ours": loop})
