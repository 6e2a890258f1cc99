"""A comparison of ledgers, for people."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from samtrain.data.ledger_compare import Difference, LedgerComparison


def ledger_tables(found: LedgerComparison, *, num_keys: int) -> Iterator[RenderableType]:
    """Both ledgers' sums, the first step that differs with its keys, and the verdict."""
    yield _sums(found)
    if found.difference is not None:
        yield _step(found.difference, num_keys=num_keys)
    yield Text(verdict(found))


def verdict(found: LedgerComparison) -> str:
    """One line."""
    if found.difference is None:
        return f"equal: {found.a.steps} steps, digest {found.a.digest}"
    if found.difference.a is None or found.difference.b is None:
        short, long = sorted((found.a, found.b), key=lambda one: one.steps)
        more = long.steps - short.steps
        return f"different: all {found.equal_steps} steps of {short.path} are equal, {long.path} has {more} more"
    step = found.difference.step
    return f"different from step {step} on ({found.difference.what}); the first {found.equal_steps} steps are equal"


def _sums(found: LedgerComparison) -> Table:
    table = Table(title="ledgers", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("ledger", overflow="fold")
    for column in ("steps", "used", "skipped"):
        table.add_column(column, justify="right")
    table.add_column("quarantined shards", overflow="fold")
    table.add_column("digest", no_wrap=True)
    for name, one in (("A", found.a), ("B", found.b)):
        steps = f"{one.steps}{' + a torn line' if one.is_torn else ''}"
        shards = Text(", ".join(one.quarantined) or "none")
        table.add_row(
            name, Text(str(one.path)), steps, str(one.used), str(one.skipped), shards, f"{one.digest[:12]}..."
        )
    return table


def _step(difference: Difference, *, num_keys: int) -> Table:
    title = f"step {difference.step}: {difference.what}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("used in order", "used here only", "skipped"):
        table.add_column(column, overflow="fold")
    for name, side, only in (("A", difference.a, difference.only_a), ("B", difference.b, difference.only_b)):
        if side is None:
            table.add_row(name, Text("(no such step)"), "", "")
            continue
        skipped = [f"{key}: {reason}" for key, reason in side.skipped.items()]
        table.add_row(name, *(Text(_some(keys, num_keys)) for keys in (side.used, only, skipped)))
    return table


def _some(keys: list[str], count: int) -> str:
    more = len(keys) - count
    return "\n".join([*keys[:count], *([f"and {more} more"] if more > 0 else [])])
