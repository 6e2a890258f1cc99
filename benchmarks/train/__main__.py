"""`python -m benchmarks.train`: a training step of ours beside what users would run; see benchmarks/README.md."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.kernels import machine
from benchmarks.kernels import measure as kernels_measure
from benchmarks.train import report
from benchmarks.train.lengths import TEXTS
from benchmarks.train.loops import ROWS
from benchmarks.train.measure import ROUNDS, STEPS
from benchmarks.train.run import DEFAULT_PEERS, EXTRAS, Selection, run_on_cpu, run_on_gpu
from benchmarks.train.shapes import SHAPES, TRAINS
from samtrain.core.peak import peak_tflops
from samtrain.core.versions import versions

RESULTS = Path(__file__).resolve().parents[1] / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command(help=__doc__)
def main(
    shape: Annotated[list[str] | None, typer.Option(help=", ".join(SHAPES))] = None,
    train: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TRAINS)}; what trains")] = None,
    text: Annotated[str, typer.Option(help="; ".join(f"{k}: {v}" for k, v in TEXTS.items()))] = "mini",
    peer: Annotated[str, typer.Option(help=f"comma-separated, or none: {', '.join(ROWS)}")] = ",".join(DEFAULT_PEERS),
    samples: Annotated[int | None, typer.Option(help="of a step", min=1)] = None,
    max_images: Annotated[int | None, typer.Option(help="of a pack", min=5)] = None,
    context: Annotated[str, typer.Option(help="others, all")] = "others",
    layers: Annotated[str, typer.Option(help="l,k of guidance; default: the recipes'")] = "",
    checkpointing: Annotated[bool | None, typer.Option(help="default: with --train full only")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = ROUNDS,
    steps: Annotated[int, typer.Option(help="timed in a row's turn", min=1)] = STEPS,
    seconds: Annotated[
        float | None, typer.Option(help="for all rounds of a table: fewer rounds where it is short")
    ] = None,
    extra: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(EXTRAS)}")] = "",
    num_workers: Annotated[int, typer.Option(help="threads that decode, for --extra data", min=1)] = 8,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace of one step of ours")] = None,
    counts: Annotated[bool, typer.Option(help="without a GPU: count the real shape (minutes)")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file; text goes beside it")] = None,
    append: Annotated[bool, typer.Option(help="keep the tables of the file that are not in this run")] = False,
) -> None:
    has_gpu = torch.cuda.is_available()
    if not has_gpu and (extra or trace):
        raise typer.BadParameter("--extra and --trace take times, which only a GPU's machine has")
    header = _header(has_gpu)
    say("\n".join(report.headline(header)))
    out = out or RESULTS / f"train-{_machine_name(has_gpu)}.json"
    tables: list[report.Table] = report.read(out)["tables"] if append and out.exists() else []
    _known("--context", [context], ("others", "all"))  # what the reference-style loop has
    for shape_name in _known("--shape", shape or ["7b"], tuple(SHAPES)):
        chosen = SHAPES[shape_name]
        chosen = replace(
            chosen, samples=samples or chosen.samples, max_images=max_images or chosen.max_images, context=context
        )
        if layers:
            initial, contextual = (int(n) for n in layers.split(","))
            chosen = replace(chosen, initial_layer=initial, contextual_layer=contextual)
        for train_name in _known("--train", train or ["frozen"], TRAINS):
            selection = Selection(
                shape=chosen,
                train=train_name,  # type: ignore[arg-type]
                text=_known("--text", [text], tuple(TEXTS))[0],  # type: ignore[arg-type]
                peers=tuple(_known("--peer", _list(peer), tuple(ROWS))),
                checkpointing=train_name == "full" if checkpointing is None else checkpointing,
                rounds=rounds,
                steps=steps,
                seconds=seconds,
                extras=tuple(_known("--extra", _list(extra), EXTRAS)),
                num_workers=num_workers,
                trace=trace,
            )
            if has_gpu:
                table = run_on_gpu(selection, say, memory_bytes=header["memory_bytes"], device=torch.device("cuda"))
            else:
                table = run_on_cpu(selection, say, counts=counts)
            say(report.table_text(table, header))
            tables = report.merged(tables, [table])
            report.write(out, header, tables)  # after every table: a later one may break
    print(out.with_suffix(".txt").read_text(), end="")
    say(f"wrote {out} and {out.with_suffix('.txt')}")
    wrong = [
        f"{t['shape']} {t['train']}: {r['label']}"
        for t in tables
        for r in t["rows"]
        if r["match"] in ("FAIL", "error") or r.get("status") == "error"
    ]
    if wrong:
        say("rows that failed: " + "; ".join(wrong))
        raise typer.Exit(1)


def _header(has_gpu: bool) -> dict[str, Any]:
    device = torch.device("cuda" if has_gpu else "cpu")
    found = machine.header(device, rates=kernels_measure.device_rates(device) if has_gpu else None)
    wanted = ("python", "torch", "triton", "transformers", "deepspeed", "peft", "flash-attn")
    found["versions"] = {name: version for name, version in versions().items() if name in wanted}
    if has_gpu:
        found["peak_tflops"], found["peak_source"] = peak_tflops(device, torch.bfloat16)
    return found


def _machine_name(has_gpu: bool) -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") if has_gpu else "cpu"


def _list(value: str) -> list[str]:
    return [item for item in value.split(",") if item and item != "none"]


def _known(option: str, given: list[str], known: tuple[str, ...]) -> list[str]:
    """Raises typer.BadParameter, naming what may be chosen."""
    if unknown := [name for name in given if name not in known]:
        raise typer.BadParameter(f"{option} {', '.join(unknown)}: choose from {', '.join(known)}")
    return given


if __name__ == "__main__":
    app()
