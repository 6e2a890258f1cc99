"""`samtrain data build-mmlink CONFIG [key=value ...]`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `samtrain data`."""
    app.command("build-mmlink")(_command)


def _command(
    config: Annotated[Path, typer.Argument(help="a YAML file, e.g. recipes/data/mmlink_offline.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the whole report")] = False,
) -> None:
    """Build MmLINK: pictures that share a thing, with instruction and answer; goes on where it stopped."""
    report = run_build(config, overrides or [])
    print(json.dumps(report, indent=2, ensure_ascii=False) if as_json else summary(report))


def run_build(config: Path, overrides: list[str]) -> dict[str, Any]:
    """Build with a progress bar per stage on stderr; returns the report."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from samtrain.core.log import configure_logging
    from samtrain.data.mmlink.build import build_mmlink
    from samtrain.data.mmlink.config import load_config

    configure_logging()
    checked = load_config(config, overrides)
    columns = (TextColumn("{task.description:>18}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        return build_mmlink(checked, progress=show)


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    from samtrain.data.mmlink.options import STAGES

    lines = ["complete already: nothing was to be done; this is how it was built"] if report["reused"] else []
    lines += [
        f"{'stage':>10} {'jobs':>7} {'found':>7} {'done':>7} {'rejected':>8} {'failed':>6} "
        f"{'seconds':>9} {'ms/item':>8} {'cpu ms':>8}"
    ]
    for name in (stage for stage in STAGES if stage in report["stages"]):
        row = report["stages"][name]
        times = [row[time] for time in ("work_seconds_per_item", "cpu_seconds_per_item")]
        lines.append(
            f"{name:>10} {row['jobs']:>7} {row['found']:>7} {row['done']:>7} {row['rejected']:>8} {row['failed']:>6} "
            f"{row['seconds']:>9.1f} " + " ".join(f"{'' if t is None else f'{1000 * t:.1f}':>8}" for t in times)
        )
    filters = report["filters"]
    lines.append(f"kept {filters['kept']} of {filters['planned']} planned samples; not kept: {filters['not_kept']}")
    for split, row in report["splits"].items():
        lines.append(f"{split:>10}: {row['samples']} samples, {row['images']} images, {row['identities']} identities")
    return "\n".join(lines)
