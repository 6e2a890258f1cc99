"""Two runs' ledgers side by side: the same history, or the first step in which they differ.

Every line is checked on the way (steps in order, hashes that follow from the keys), so a ledger that was edited is
refused, not compared. A last line that is not whole, as of a run that goes on or was killed, is left out and told.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.data.ledger import START_DIGEST, read_line

LEDGER_FILE = "ledger.jsonl"


@dataclass
class LedgerSummary:
    """Sums over one ledger. used, skipped: samples over all steps, each as often as it was met.

    quarantined: shard -> reason. is_torn: its last line is not whole.
    """

    path: Path
    steps: int = 0
    used: int = 0
    skipped: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)
    digest: str = START_DIGEST
    is_torn: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "steps": self.steps,
            "used": self.used,
            "skipped": self.skipped,
            "quarantined": self.quarantined,
            "digest": self.digest,
            "torn": self.is_torn,
        }


@dataclass(frozen=True)
class Side:
    """One run's step: used keys in order, skipped key -> reason."""

    used: list[str]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Difference:
    """The first step that differs; a side is None where its ledger has ended."""

    step: int
    a: Side | None
    b: Side | None

    @property
    def only_a(self) -> list[str]:
        """Keys that A used in this step and B did not."""
        return _minus(self.a, self.b)

    @property
    def only_b(self) -> list[str]:
        return _minus(self.b, self.a)

    @property
    def what(self) -> str:
        """In words."""
        if self.a is None or self.b is None:
            return f"{'A' if self.a is None else 'B'} ends before it"
        only = {*self.only_a, *self.only_b}
        if not only:
            same = self.a.skipped.keys() == self.b.skipped.keys()
            return "the same keys in another order" if same else "the same keys are used, others are skipped"
        if only <= self.a.skipped.keys() | self.b.skipped.keys():
            return "one skipped what the other used"
        return "some keys differ" if set(self.a.used) & set(self.b.used) else "no key is the same"

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "what": self.what,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "a": asdict(self.a) if self.a else None,
            "b": asdict(self.b) if self.b else None,
        }


@dataclass(frozen=True)
class LedgerComparison:
    """equal_steps: so many steps from the start are equal."""

    a: LedgerSummary
    b: LedgerSummary
    equal_steps: int
    difference: Difference | None

    @property
    def is_equal(self) -> bool:
        return self.difference is None

    def to_dict(self) -> dict[str, Any]:
        return {
            "equal": self.is_equal,
            "equal_steps": self.equal_steps,
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "difference": self.difference.to_dict() if self.difference else None,
        }


def compare_ledgers(a: str | Path, b: str | Path) -> LedgerComparison:
    """Compare two ledgers, each a file or the output_dir of a run.

    Raises:
        DataError: one is missing, torn or edited; it is named.
    """
    summaries = LedgerSummary(find_ledger(a)), LedgerSummary(find_ledger(b))
    difference: Difference | None = None
    equal = 0
    for step, sides in enumerate(zip_longest(*(_steps(summary) for summary in summaries)), 1):
        if difference is not None:
            continue  # only the sums go on
        one, other = sides
        if (
            one is not None
            and other is not None
            and (one.used, one.skipped.keys())
            == (
                other.used,
                other.skipped.keys(),
            )
        ):
            equal = step
        else:
            difference = Difference(step, one, other)
    return LedgerComparison(*summaries, equal, difference)


def find_ledger(path: str | Path) -> Path:
    """The ledger file of a run's folder, or the file itself.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    found = path / LEDGER_FILE if path.is_dir() else path
    if not found.is_file():
        raise DataError(f"{found}: no such ledger; give a ledger.jsonl or the output_dir of a run")
    return found


def _steps(summary: LedgerSummary) -> Iterator[Side]:
    """The steps of a ledger, checked; `summary` grows on the way."""
    with open(summary.path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                summary.is_torn = True
                return
            try:
                values, digest = read_line(line, summary.digest, step=summary.steps + 1)
            except ValueError as error:
                raise DataError(f"{summary.path}: {error}: it was cut or edited") from None
            side = Side(values["keys"], values["skipped"])
            summary.steps += 1
            summary.used += len(side.used)
            summary.skipped += len(side.skipped)
            summary.quarantined |= values.get("quarantined", {})
            summary.digest = digest
            yield side


def _minus(one: Side | None, other: Side | None) -> list[str]:
    if one is None or other is None:
        return []
    used = set(other.used)
    return [key for key in one.used if key not in used]
