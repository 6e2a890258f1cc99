"""What lint found, for people: one table for each kind, with the first examples and what to do."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from samtrain.data.lint.findings import KINDS
from samtrain.data.lint.lint import LintReport

NUM_EXAMPLES = 3


def lint_tables(report: LintReport, *, num_examples: int = NUM_EXAMPLES) -> Iterator[RenderableType]:
    """What was looked at, a table for each kind of finding, and the verdict."""
    yield _overview(report)
    for kind, count in report.counts.items():
        title = f"{kind}: {count} x {KINDS[kind].what}" + (" (ignored)" if kind in report.ignored else "")
        table = Table(title=Text(title), title_justify="left", title_style="bold", expand=False)
        table.caption, table.caption_justify = Text(f"What to do: {KINDS[kind].advice}"), "left"
        for column in ("split", "shard", "key", "what is wrong"):
            table.add_column(column, overflow="fold")
        examples = [finding for finding in report.findings if finding.kind == kind][:num_examples]
        for finding in examples:
            table.add_row(Text(finding.split), Text(finding.shard), Text(finding.key), Text(finding.reason))
        if count > len(examples):
            table.add_row("", "", "", f"and {count - len(examples)} more")
        yield Text("")
        yield table
    yield Text("")
    yield Text(verdict(report))


def _overview(report: LintReport) -> Table:
    table = Table(title=Text(f"{report.path}"), title_justify="left", title_style="bold")
    table.add_column("split")
    for column in ("shards", "MiB", "samples", "images", "good samples"):
        table.add_column(column, justify="right")
    for name, split in report.to_dict()["splits"].items():
        size = f"{split['bytes'] / 2**20:.1f}"
        counts = (split["shards"], size, split["samples"], split["images"], split["good_samples"])
        table.add_row(Text(name), *(str(value) for value in counts))
    return table


def verdict(report: LintReport) -> str:
    """One line."""
    samples = sum(len(split.samples) for split in report.splits)
    what = f"{samples} samples looked at in {report.seconds:.1f} s: "
    if not report.findings:
        return f"{what}nothing is wrong"
    if report.is_clean:
        return f"{what}nothing but findings that are ignored"
    bad = sum(not report.is_good(sample) for split in report.splits for sample in split.samples)
    return f"{what}{len(report.findings)} findings, {bad} samples would be left out of a clean set"
