"""`python -m benchmarks.kernels`: tables of every shape, mode and level; see benchmarks/README.md."""

import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from benchmarks.kernels import figure, machine, measure, report
from benchmarks.kernels.interpreted import check_interpreted
from benchmarks.kernels.registry import rows_of
from benchmarks.kernels.run import Selection, run_on_cpu, run_on_gpu
from benchmarks.kernels.shapes import CONTEXTS, LEVELS, SHAPES, Level

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPE_NAMES = (*SHAPES, "N")
MODES = ("frozen", "trained")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command(help=__doc__)
def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SHAPE_NAMES)} (N: 2 to 10 images)")] = None,
    level: Annotated[list[str] | None, typer.Option(help=", ".join(LEVELS))] = None,
    mode: Annotated[list[str] | None, typer.Option(help=", ".join((*MODES, *CONTEXTS)))] = None,
    only: Annotated[list[str] | None, typer.Option(help="names of implementations")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; text and figure go beside it")] = None,
    restarts: Annotated[int, typer.Option(help="process starts; the worst median of each row counts", min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="few samples, no variants: a look, not a result")] = False,
    append: Annotated[bool, typer.Option(help="keep the tables that are in the file and not in this run")] = False,
) -> None:
    selection = _selection(shape or [], level or [], mode or [], only or [], quick=quick)
    has_gpu = torch.cuda.is_available()
    out = out or RESULTS / f"{_default_name()}.json"
    notes: list[str] = []
    if has_gpu and restarts > 1:
        header, tables = _restarted(restarts)
        notes.append(f"worst median of {restarts} process starts")
    elif has_gpu:
        device = torch.device("cuda")
        rates = measure.device_rates(device)
        header = machine.header(device, rates=rates)
        say("\n".join(machine.headline(header)))
        tables = run_on_gpu(selection, rates, say)
    else:
        header = machine.header(torch.device("cpu"), rates=None)
        say("\n".join(machine.headline(header)))
        tables = run_on_cpu(selection, say)
        notes += _notes_without_gpu(selection)
    if quick:
        notes.append("QUICK: few samples, or few shapes. Not a result.")
    if append and out.exists():
        tables = report.merged(report.read(out)["tables"], tables)
    report.write(out, header, tables, notes=notes)
    print(out.with_suffix(".txt").read_text(), end="")
    if figure.draw(out.with_suffix(".png"), header, tables):
        say(f"wrote {out.with_suffix('.png')}")
    say(f"wrote {out} and {out.with_suffix('.txt')}")
    wrong = [f"{t['level']} {t['shape']}: {r['label']}" for t in tables for r in t["rows"] if _is_wrong(r)]
    if wrong:
        say("our rows that failed the gate: " + "; ".join(wrong))
        raise typer.Exit(1)


def _is_wrong(row: dict[str, Any]) -> bool:
    return row["family"] == "ours" and row["match"] in ("FAIL", "error")


def _selection(shape: list[str], level: list[str], mode: list[str], only: list[str], *, quick: bool) -> Selection:
    """Raises typer.BadParameter, naming what may be chosen."""
    for option, given, known in (
        ("--shape", shape, SHAPE_NAMES),
        ("--level", level, tuple(get_args(Level))),
        ("--mode", mode, (*MODES, *CONTEXTS)),
    ):
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"{option} {', '.join(unknown)}: choose from {', '.join(known)}")
    try:
        rows_of("op", only=tuple(only))
    except ValueError as error:
        raise typer.BadParameter(f"--only: {error}") from None
    return Selection(
        shapes=tuple(shape),
        levels=tuple(level),  # type: ignore[arg-type]
        contexts=tuple(m for m in mode if m in CONTEXTS),
        modes=tuple(m for m in mode if m in MODES),
        only=tuple(only),
        quick=quick,
    )


def _default_name() -> str:
    if not torch.cuda.is_available():
        return "kernels-cpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"kernels-{name}"


def _restarted(restarts: int) -> tuple[dict[str, Any], list[report.Table]]:
    """This very command in new processes, one after the other."""
    arguments = [a for a in sys.argv[1:] if a != "--append"]
    for option in ("--restarts", "--out"):
        while any(a.split("=")[0] == option for a in arguments):
            i = next(i for i, a in enumerate(arguments) if a.split("=")[0] == option)
            del arguments[i : i + (1 if "=" in arguments[i] else 2)]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(restarts):
            out, since = Path(folder) / f"{i}.json", time.monotonic()
            # Exit code 1 says that a row failed; the file is there all the same.
            subprocess.run([sys.executable, "-m", "benchmarks.kernels", *arguments, "--out", str(out)], check=False)
            runs.append(report.read(out))
            say(f"start {i + 1} of {restarts} took {time.monotonic() - since:.0f} s")
    return runs[0]["header"], report.worst_of([run["tables"] for run in runs])


def _notes_without_gpu(selection: Selection) -> list[str]:
    """What the columns mean here, and the kernels' own verdict from the interpreter."""
    notes = [
        "match: float32, toy widths, against float64, outputs and gradients; counts: fake bfloat16 tensors, real shape",
        "launches: dispatched operations that are no views; an operation of ours counts once, whatever it launches.",
        "saved: kept for backward beside inputs and parameters. eager traffic: inputs and outputs of every operation.",
        "compiled rows: what a compiler fuses is not counted here.",
    ]
    if selection.only and "ours" not in selection.only:
        return notes
    if importlib.util.find_spec("triton") is None:
        return [*notes, "our Triton kernels were not checked: triton is not installed (`make bench` installs it)"]
    verdicts = check_interpreted()
    words = ", ".join(
        f"{v['level']} {v['context']} {v['match']}" + (f" ({v['why']})" if v["why"] else "") for v in verdicts
    )
    return [*notes, f"our Triton kernels in Triton's interpreter, float32, toy shapes: {words}"]


if __name__ == "__main__":
    app()
