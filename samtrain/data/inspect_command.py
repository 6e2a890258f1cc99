"""`samtrain data lint | stats | show | ledger`: look at shards and at what runs did with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from samtrain.core.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the commands to `samtrain data`."""
    app.command("lint")(lint_command)
    app.command("stats")(stats_command)
    app.command("show")(show_command)
    app.command("ledger")(ledger_command)


def lint_command(
    shards: Annotated[str, typer.Argument(help="a folder of shards, or a data set with one folder for each split")],
    report: Annotated[Path | None, typer.Option("--json", help="write everything that was found here")] = None,
    fix: Annotated[Path | None, typer.Option(help="write a clean set of the good samples to this new folder")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="a kind that is no reason to fail; may be repeated")] = None,
    examples: Annotated[int, typer.Option(min=1, help="examples shown of each kind")] = 3,
    num_workers: Annotated[int | None, typer.Option(min=1, help="processes; one for each core otherwise")] = None,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="more are oversized")] = 64_000_000,
    max_member_bytes: Annotated[int, typer.Option(min=1, help="more are oversized")] = 64 * 1024**2,
    max_text_bytes: Annotated[int, typer.Option(min=1, help="more are oversized; of instruction, of answer")] = 65536,
) -> None:
    """Decode and check everything. Exit status: 0 nothing is wrong, 1 something is, 2 it could not be looked at."""
    from rich.console import Console

    from samtrain.core.files import atomic_write_json
    from samtrain.data.lint import Limits, lint
    from samtrain.data.lint.fix import check_output, write_clean
    from samtrain.data.lint.table import lint_tables
    from samtrain.data.parallel import available_cores
    from samtrain.data.storage import Url, parse_location

    folder = parse_location(shards)
    if isinstance(folder, Url):
        raise DataError(f"{folder}: lint decodes everything and reads local folders; copy the set to one first")
    limits = Limits(max_image_pixels=max_image_pixels, max_member_bytes=max_member_bytes, max_text_bytes=max_text_bytes)
    if fix is not None:
        check_output(folder, fix)  # before the minutes of looking
    with progress_bars() as progress:
        found = lint(
            folder,
            limits=limits,
            ignore=frozenset(ignore or ()),
            num_workers=num_workers or available_cores(),
            progress=progress,
        )
    written = found.to_dict()
    console = Console()
    for part in lint_tables(found, num_examples=examples):
        console.print(part)
    if fix is not None:
        with progress_bars() as progress:
            written["fix"] = write_clean(found, fix, progress=progress)
        console.print(_fixed(written["fix"]), markup=False, highlight=False)
    if report is not None:
        _writing(report, lambda: atomic_write_json(report, written))
    raise typer.Exit(0 if found.is_clean else 1)


def stats_command(
    shards: Annotated[str, typer.Argument(help="a folder or URL of shards, or of a data set with one for each split")],
    tokenizer: Annotated[str | None, typer.Option(help="count tokens: a folder or a hub name; else words")] = None,
    report: Annotated[Path | None, typer.Option("--json", help="write all numbers here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a figure here, PNG")] = None,
) -> None:
    """Images per sample, their sizes, lengths of texts: for each split and task, from the records."""
    from rich.console import Console

    from samtrain.core.files import atomic_write_json
    from samtrain.data.stats import set_stats
    from samtrain.data.stats_report import stats_figure, stats_table

    with progress_bars() as progress:
        stats = set_stats(shards, tokenizer=tokenizer, progress=progress)
    Console().print(stats_table(stats))
    if report is not None:
        _writing(report, lambda: atomic_write_json(report, stats.to_dict()))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        _writing(plot, lambda: stats_figure(stats).savefig(plot, dpi=110, format="png"))
        print(f"wrote {plot}")


def show_command(
    shards: Annotated[str, typer.Argument(help="a folder or URL of shards, or of a data set with one for each split")],
    key: Annotated[list[str] | None, typer.Option(help="the sample of this key; may be repeated")] = None,
    random: Annotated[int | None, typer.Option(help="so many samples of all splits")] = None,
    seed: Annotated[int, typer.Option(help="another seed, other samples")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="the picture, PNG")] = Path("samples.png"),
    boxes: Annotated[bool, typer.Option(help="outline the objects a set lists, as mmlink-mini does")] = False,
) -> None:
    """Write a picture of samples: their images in order, instruction and answer beneath."""
    from samtrain.data.sheet import draw_samples, save_sheet
    from samtrain.data.show import choose_keys, choose_random, load_indexes, shown

    if bool(key) == (random is not None):
        raise DataError("give either --key KEY (once or more) or --random N")
    indexes = load_indexes(shards)
    places = choose_keys(indexes, key) if key else choose_random(indexes, random or 0, seed=seed)
    sheet = draw_samples(shown(places, boxes=boxes))
    _writing(output, lambda: save_sheet(sheet, output))
    print(f"wrote {output}: {', '.join(index.entries[i].key for index, i in places)}")


def ledger_command(
    a: Annotated[Path, typer.Argument(help="a run's output_dir, or its ledger.jsonl")],
    b: Annotated[Path, typer.Argument(help="another's")],
    report: Annotated[Path | None, typer.Option("--json", help="write the comparison here")] = None,
    num_keys: Annotated[int, typer.Option(min=1, help="keys shown of the step that differs")] = 10,
) -> None:
    """Compare what two runs trained on. Exit status: 0 equal, 1 different, 2 a ledger cannot be used."""
    from rich.console import Console

    from samtrain.core.files import atomic_write_json
    from samtrain.data.ledger_compare import compare_ledgers
    from samtrain.data.ledger_table import ledger_tables

    found = compare_ledgers(a, b)
    console = Console()
    for part in ledger_tables(found, num_keys=num_keys):
        console.print(part)
    if report is not None:
        _writing(report, lambda: atomic_write_json(report, found.to_dict()))
    raise typer.Exit(0 if found.is_equal else 1)


def _fixed(fixed: dict[str, object]) -> str:
    return (
        f"clean set: {fixed['path']}: {fixed['samples']} samples; {fixed['left_out']} left out, "
        f"{fixed['mended']} mended, {fixed['lost']} lost from the shards (left_out.jsonl lists them)"
    )


def _writing(path: Path, write: Callable[[], object]) -> None:
    """Write a file that was asked for; a disk that refuses is one message."""
    try:
        write()
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from None


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr for (what, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
