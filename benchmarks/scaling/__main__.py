"""`python -m benchmarks.scaling`: ZeRO-3 on 8 to 1,024 GPUs, computed; see benchmarks/README.md."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.kernels import machine
from benchmarks.scaling import report
from benchmarks.scaling.network import Network
from benchmarks.scaling.recipes import PartSeconds, Recipe, Workload
from benchmarks.scaling.study import STRATEGIES, WORLD_SIZES, Assumptions, study
from benchmarks.train.lengths import TEXTS
from benchmarks.train.shapes import SHAPES, TRAINS

RESULTS = Path(__file__).resolve().parents[1] / "results"
H200 = 989e12  # dense bf16, data sheet
ASSUMED_MFU = {"vision": 0.45, "qformer": 0.25, "language_model": 0.55}  # until benchmarks.train has run on a GPU

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Option(help="comma-separated")] = "7b,13b",
    train: Annotated[str, typer.Option(help="comma-separated: frozen, lora, full")] = ",".join(TRAINS),
    text: Annotated[str, typer.Option(help=", ".join(TEXTS))] = "mini",
    strategy: Annotated[str, typer.Option(help="comma-separated")] = ",".join(STRATEGIES),
    gpus: Annotated[str, typer.Option(help="comma-separated")] = ",".join(map(str, WORLD_SIZES)),
    measured: Annotated[Path | None, typer.Option(help="JSON of benchmarks.train from a GPU")] = None,
    out: Annotated[Path, typer.Option(help="JSON file; text and figure go beside it")] = RESULTS / "scaling.json",
) -> None:
    recipes = [Recipe(SHAPES[s], t, t != "frozen") for s in shape.split(",") for t in train.split(",")]  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        assumptions = Assumptions(Network(), part_seconds(measured, recipe))
        workload = Workload(recipe, text=text)  # type: ignore[arg-type]
        sizes = [int(n) for n in gpus.split(",")]
        rows += study(recipe, workload, assumptions, strategies=strategy.split(","), world_sizes=sizes)
        rows += study(recipe, workload, assumptions, scaling="strong", strategies=["partitioned"], world_sizes=sizes)
        print(f"{recipe.name}: done", file=sys.stderr, flush=True)
    header = machine.header(torch.device("cpu"), rates=None)
    report.write(out, header, assumptions, rows, text=TEXTS[text])  # type: ignore[index]
    report.draw(out.with_suffix(".png"), rows)
    print(out.with_suffix(".txt").read_text(), end="")


def part_seconds(measured: Path | None, recipe: Recipe) -> PartSeconds:
    """From the breakdown of ours in a file of benchmarks.train, else assumed.

    Raises:
        typer.BadParameter: the file has no such table.
    """
    if measured is None:
        return PartSeconds(ASSUMED_MFU, H200, "ASSUMED, no GPU has run benchmarks.train yet")
    content = json.loads(measured.read_text())
    for table in content["tables"]:
        if (table["shape"], table["train"]) != (recipe.shape.name, recipe.train):
            continue
        ours = next(row for row in table["rows"] if row["name"] == "ours")
        if "breakdown" not in ours:
            break
        return measured_mfu(ours, content["header"])
    raise typer.BadParameter(f"--measured {measured}: has no times of ours for {recipe.name}")


def measured_mfu(row: dict[str, Any], header: dict[str, Any]) -> PartSeconds:
    """The share of the peak that each part reached; head, loss and the rest of the step count as the LLM's."""
    times, work = row["breakdown"]["parts"], row["work"]
    peak = header["peak_tflops"] * 1e12
    rest = sum(times[name] for name in ("llm", "head", "loss", "other"))
    groups = {
        "vision": (work["vision"], times["vision"]),
        "qformer": (work["qformer"], times["qformer"]),
        "language_model": (work["llm"] + work["head"], rest),
    }
    mfu = {part: flops / (milliseconds / 1e3) / peak for part, (flops, milliseconds) in groups.items()}
    return PartSeconds(mfu, peak, f"measured on {header['gpu']}, commit {header['commit'][:12]}")


if __name__ == "__main__":
    app()
