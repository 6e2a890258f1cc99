"""`python -m benchmarks.scaling`: ZeRO-3 on 8 to 1,024 GPUs, computed; see benchmarks/README.md."""

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.kernels import machine
from benchmarks.scaling import report
from benchmarks.scaling.network import Network
from benchmarks.scaling.parts import measured as measured_parts
from benchmarks.scaling.parts import predicted
from benchmarks.scaling.recipes import Recipe, Workload
from benchmarks.scaling.study import STRATEGIES, WORLD_SIZES, Assumptions, study
from benchmarks.train.lengths import TEXTS
from benchmarks.train.shapes import SHAPES, TRAINS

RESULTS = Path(__file__).resolve().parents[1] / "results"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Option(help="comma-separated")] = "7b,13b",
    train: Annotated[str, typer.Option(help="comma-separated: frozen, lora, full")] = ",".join(TRAINS),
    text: Annotated[str, typer.Option(help=", ".join(TEXTS))] = "mini",
    strategy: Annotated[str, typer.Option(help="comma-separated")] = ",".join(STRATEGIES),
    gpus: Annotated[str, typer.Option(help="comma-separated")] = ",".join(map(str, WORLD_SIZES)),
    measured: Annotated[
        list[Path] | None, typer.Option(help="JSON of benchmarks.train from a GPU; default: those in results/")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file; text and figure go beside it")] = RESULTS / "scaling.json",
) -> None:
    known = measured_parts(measured or sorted(RESULTS.glob("train-*.json")))
    if measured and not known:
        raise typer.BadParameter(f"--measured {', '.join(map(str, measured))}: no GPU's breakdown of ours is in it")
    recipes = [Recipe(SHAPES[s], t, t == "full") for s in shape.split(",") for t in train.split(",")]  # type: ignore[arg-type]
    sizes = [int(n) for n in gpus.split(",")]
    assumptions, rows = {}, list[dict[str, Any]]()
    for recipe in recipes:
        seconds = known.get((recipe.shape.name, recipe.train)) or predicted()
        assumptions[recipe.name] = own = Assumptions(Network(), seconds)
        workload = Workload(recipe, text=text)  # type: ignore[arg-type]
        rows += study(recipe, workload, own, strategies=strategy.split(","), world_sizes=sizes)
        rows += study(recipe, workload, own, scaling="strong", strategies=["partitioned"], world_sizes=sizes)
        print(f"{recipe.name}: done", file=sys.stderr, flush=True)
    header = machine.header(torch.device("cpu"), rates=None)
    report.write(out, header, assumptions, rows, text=TEXTS[text])  # type: ignore[index]
    report.draw(out.with_suffix(".png"), rows)
    print(out.with_suffix(".txt").read_text(), end="")


if __name__ == "__main__":
    app()
