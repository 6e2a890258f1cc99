"""`samtrain data convert`: progress on stderr, counts on stdout, everything else in the report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from samtrain.data.convert.report import Report

SHARED = "Limits and shards"
OF_FORMATS = "What the format leaves open"


def register(app: typer.Typer) -> None:
    """Add the command to `samtrain data`."""
    app.command("convert")(convert_command)


def convert_command(
    format: Annotated[str, typer.Argument(help="annotations, demon, vist, aesop, ssid, nico, messages, llava, shards")],
    source: Annotated[Path, typer.Argument(metavar="IN", help="a file of that format, or the folder that holds it")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder: OUT/<split>/ holds shards")],
    to: Annotated[str | None, typer.Option(help="of shards: annotations or messages")] = None,
    images: Annotated[Path | None, typer.Option(help="folder that image names are relative to")] = None,
    split: Annotated[str | None, typer.Option(help="name where the format has none")] = None,
    task: Annotated[str | None, typer.Option(help="name of the task instead of the set's")] = None,
    limit: Annotated[int | None, typer.Option(help="stop each split at so many samples")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first broken record")] = False,
    max_bad_fraction: Annotated[float | None, typer.Option(help="stop when more records are broken [0.02]")] = None,
    report: Annotated[Path | None, typer.Option(help="where the JSON report goes [OUT.convert.json]")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="prefix: texts as they are; interleaved: one <image> each", rich_help_panel=OF_FORMATS),
    ] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(help="stories, nico: JSON list or DEMON file of instructions", rich_help_panel=OF_FORMATS),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="nico: pictures of a group [5]", rich_help_panel=OF_FORMATS)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of what is drawn [0]", rich_help_panel=OF_FORMATS)] = None,
    max_image_pixels: Annotated[int | None, typer.Option(rich_help_panel=SHARED)] = None,
    max_image_bytes: Annotated[int | None, typer.Option(rich_help_panel=SHARED)] = None,
    max_images: Annotated[int | None, typer.Option(help="of one sample", rich_help_panel=SHARED)] = None,
    max_text_bytes: Annotated[int | None, typer.Option(rich_help_panel=SHARED)] = None,
    max_samples_per_shard: Annotated[int | None, typer.Option(rich_help_panel=SHARED)] = None,
    max_shard_bytes: Annotated[int | None, typer.Option(rich_help_panel=SHARED)] = None,
) -> None:
    """Foreign formats to shards, and shards to annotations.json or messages. Images are copied byte for byte.

    What cannot be used is listed in OUT.convert.json with its reason. Exit status 2: nothing was written but that.
    """
    values = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}

    from samtrain.core.options import parse_options
    from samtrain.data.convert.convert import convert
    from samtrain.data.convert.options import ConvertOptions
    from samtrain.data.inspect_command import progress_bars

    given = {name: value for name, value in values.items() if value is not None}
    options = parse_options(ConvertOptions, given, source="command line")
    with progress_bars() as progress:
        found = convert(options, progress=progress)
    show_report(found, options.output)


def show_report(report: "Report", output: str) -> None:
    """Counts, the most frequent reasons, and where the list is."""
    from rich.console import Console
    from rich.table import Table

    from samtrain.data.convert.base import shown

    console = Console()
    table = Table("split", "records", "converted", "listed", "samples", "images")
    for name, count in report.splits.items():
        numbers = (count.records, count.converted, count.listed, count.samples, count.images)
        table.add_row(name, *(str(number) for number in numbers))
    console.print(table)
    lines = [f"{number} x {reason}" for reason, number in report.reasons.most_common(5)]
    lines += [f"{number} {note}" for note, number in sorted(report.notes.items())]
    if report.unknown_fields:
        names = ", ".join(f"{shown(name)} ({number})" for name, number in sorted(report.unknown_fields.items()))
        lines.append(f"fields that the format does not know, kept in `meta`: {names}")
    for line in [*lines, f"wrote {output}, report {report.path}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
