"""`samtrain data convert`: progress on stderr, counts on stdout, everything else in the report."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from samtrain.core.options import parse_options
from samtrain.data.convert.base import shown
from samtrain.data.convert.convert import convert
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.report import Report


def convert_command(values: dict[str, Any]) -> None:
    """Convert, with values of the command line; those that are None keep their defaults.

    Raises:
        InputError: nothing was written but the report.
    """
    given = {name: value for name, value in values.items() if value is not None}
    options = parse_options(ConvertOptions, given, source="command line")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        report = convert(options, progress=show)
    show_report(report, options)


def show_report(report: Report, options: ConvertOptions) -> None:
    """Counts, the most frequent reasons, and where the list is."""
    console = Console()
    table = Table("split", "records", "converted", "listed", "samples", "images")
    for name, count in report.splits.items():
        numbers = (count.records, count.converted, count.listed, count.samples, count.images)
        table.add_row(name, *(str(number) for number in numbers))
    console.print(table)
    for reason, number in report.reasons.most_common(5):
        console.print(f"{number} x {reason}", markup=False, highlight=False)
    for note, number in sorted(report.notes.items()):
        console.print(f"{number} {note}", markup=False, highlight=False)
    if report.unknown_fields:
        names = ", ".join(f"{shown(name)} ({number})" for name, number in sorted(report.unknown_fields.items()))
        console.print(f"fields that the format does not know, kept in meta: {names}", markup=False, highlight=False)
    console.print(f"{options.output}; report: {report.path}", markup=False, highlight=False, soft_wrap=True)
