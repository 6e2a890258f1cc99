"""A training step of ours compiled for a GPU that is not there: `python -m benchmarks.train.aot`.

The step of a real shape runs forward and backward on fake tensors of a CUDA device with everything that `auto` chooses
on one: FlexAttention and the vision tower's layers through torch.compile, Liger's kernels, and the machine code of all
of it from Triton's wheel. It answers, without a GPU:

    does it compile      every kernel, for Ampere and Hopper, within the chip's shared memory, and what it spills
    how often            compilations in each micro-batch: packs of other lengths must not compile again for ever
    does it wait         an operation that needs a value from the device fails here

Not whether a GPU computes the right thing, nor how fast. Our own kernels run as operations without data here;
`benchmarks.aot` compiles them. Writes results/aot-step.{json,txt}; exit code 1 where a kernel could not be launched.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.absent_gpu import CHIPS, Compiled, compiling_for
from benchmarks.grid import grid
from benchmarks.train.loops import OurLoop, make_ours
from benchmarks.train.models import choices_for
from benchmarks.train.run import Selection
from benchmarks.train.shapes import SHAPES, ModelShape, Train
from samtrain.core.versions import git_commit, versions
from samtrain.model.live_bytes import make_fake

OUT = Path(__file__).resolve().parents[1] / "results" / "aot-step.json"
DEFAULT = ("7b/frozen/90", "7b/lora/90", "7b/full/90", "13b/frozen/90", "7b/frozen/80")
Table = dict[str, Any]


def compile_step(
    shape: ModelShape, train: Train, capability: tuple[int, int], *, packs: Sequence[Sequence[int]] | None = None
) -> Table:
    """Compile every micro-batch of one step. Needs a process of its own: see `benchmarks.absent_gpu`.

    Args:
        packs: the step's samples, by their numbers, in each micro-batch; None: as the loader deals them.
    """
    selection = Selection(shape=shape, train=train, checkpointing=train == "full")
    data = selection.data()
    if packs is not None:
        data = replace(data, packs=tuple(map(tuple, packs)))
    step = data.global_step()  # real: its numbers decide shapes
    setting = replace(selection.setting(torch.device("cuda", 0)), made_on=torch.device("meta"))
    with compiling_for(capability) as kernels:
        loop = make_ours(setting, data, None)
        attention = choices_for(shape, train=train, guided=True, runs_on="cuda").attention
        make_fake(loop.module, setting.device)
        compiled = [_compile(loop, batch, kernels) for batch in step.micro_batches]
    return {
        "shape": shape.name,
        "train": train,
        "capability": list(capability),
        "data": data.describe(),
        "attention": attention,
        "micro_batches": [{"tokens": b.num_tokens, **found} for b, found in zip(step.micro_batches, compiled)],
        "kernels": _summary(kernels, capability),
    }


def _compile(loop: OurLoop, batch: Any, kernels: list[Compiled]) -> dict[str, int]:
    """Kernels that Inductor compiled in this micro-batch, and launches of Triton kernels by hand."""
    before = len(kernels)
    (loop.loss_sum(loop.to_device(batch)) / loop.num_labels).backward()
    new = kernels[before:]
    return {by: sum(kernel.by == by for kernel in new) for by in ("inductor", "triton")}


def _summary(kernels: Sequence[Compiled], capability: tuple[int, int]) -> list[dict[str, Any]]:
    """Each machine code once, in the order of the first launch. Of Inductor's several settings the GPU's tuner takes
    the fastest one that fits."""
    found: dict[Compiled, int] = {}
    for kernel in kernels:
        found[kernel] = found.get(kernel, 0) + 1
    return [
        {**asdict(kernel), "times": times, "problem": kernel.problem(capability)} for kernel, times in found.items()
    ]


def unlaunchable(table: Table) -> list[str]:
    """Names of kernels without any setting that fits the chip."""
    names = dict.fromkeys(row["name"] for row in table["kernels"])
    return [name for name in names if all(row["problem"] for row in table["kernels"] if row["name"] == name)]


def text(header: dict[str, Any], tables: Sequence[Table]) -> str:
    v = header["versions"]
    lines = [
        "Training steps of ours, compiled for a GPU that is not there. No GPU has run any of it; no speed is known.",
        ", ".join(f"{name} {v[name]}" for name in ("torch", "triton", "transformers", "liger-kernel") if name in v)
        + f", commit {header['commit'][:12]}",
    ]
    for table in tables:
        chip = "sm_{}{}".format(*table["capability"])
        packs = "; ".join(f"{b['tokens']} tokens: {b['inductor']}" for b in table["micro_batches"])
        lines += [
            "",
            f"{table['shape']}, {table['train']}, {chip}; attention {table['attention']}; {table['data']}",
            f"kernels that Inductor compiled in each micro-batch: {packs}",
            grid(
                [("kernel", "by", "times", "warps", "stages", "regs", "spill ld/st", "smem KiB", "")]
                + [
                    (
                        row["name"], row["by"], str(row["times"]), str(row["num_warps"]), str(row["num_stages"]),
                        str(row["code"]["registers"]), f"{row['code']['spill_loads']}/{row['code']['spill_stores']}",
                        f"{row['shared_bytes'] / 1024:.1f}", row["problem"] or "",
                    )
                    for row in table["kernels"]
                ]
            ),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def in_a_process(job: str) -> Table:
    """ "7b/frozen/90" -> its table.

    Raises:
        subprocess.CalledProcessError: its stderr was shown.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.train.aot", "--print-json", "--job", job]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    table: Table = json.loads(done.stdout.splitlines()[-1])
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    job: Annotated[list[str] | None, typer.Option(help="SHAPE/TRAIN/CHIP; default: " + ", ".join(DEFAULT))] = None,
    out: Annotated[Path, typer.Option(help="JSON file; text goes beside it")] = OUT,
    print_json: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    jobs = [_parse(one) for one in job or DEFAULT]
    if print_json:
        print(json.dumps(compile_step(*jobs[0])))
        return
    tables = []
    for one in job or DEFAULT:
        print(f"compiling {one}", file=sys.stderr, flush=True)
        try:
            tables.append(in_a_process(one))
        except subprocess.CalledProcessError:
            print(f"{one} does not compile: see above", file=sys.stderr)
            raise typer.Exit(1) from None
    wanted = ("python", "torch", "triton", "transformers", "liger-kernel")
    header = {
        "note": "compiled for a GPU that is not there; no GPU has run any of it",
        "versions": {name: version for name, version in versions().items() if name in wanted},
        "commit": git_commit(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**header, "tables": tables}, indent=1) + "\n")
    out.with_suffix(".txt").write_text(text(header, tables))
    print(text(header, tables), end="")
    if wrong := {table["shape"]: names for table in tables if (names := unlaunchable(table))}:
        print(f"kernels that the chip could not launch: {wrong}", file=sys.stderr)
        raise typer.Exit(1)


def _parse(job: str) -> tuple[ModelShape, Train, tuple[int, int]]:
    """Raises typer.BadParameter, naming what may be chosen."""
    chips = {f"{major}{minor}": (major, minor) for major, minor in CHIPS}
    match job.split("/"):
        case [shape, ("frozen" | "lora" | "full") as train, chip] if shape in SHAPES and chip in chips:
            return SHAPES[shape], train, chips[chip]
    raise typer.BadParameter(f"--job {job}: SHAPE ({', '.join(SHAPES)}) / frozen, lora, full / {', '.join(chips)}")


if __name__ == "__main__":
    app()
