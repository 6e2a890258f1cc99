"""What became of every record: counts, and each one that could not be used with its reason.

The listed ones are spooled to disk, so a set of a million broken records needs no memory. The file is JSON, the same
for the same input: it holds no times and no temporary names.
"""

import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from samtrain.core.errors import DataError

FIRST = 5  # shown on the terminal
MIN_SEEN = 1000  # of so many records or fewer, the share is taken when all were seen


@dataclass
class Count:
    """Of one split. records = converted + listed; one record may become several samples."""

    records: int = 0
    converted: int = 0
    listed: int = 0
    samples: int = 0
    images: int = 0


class Report:
    """Counts while a conversion runs; written beside the output at its end, however it ends.

    Args:
        facts: what the file says besides (format, source, options).
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, max_bad_fraction: float, strict: bool) -> None:
        self.path = path
        self.splits: dict[str, Count] = {}
        self.first: list[str] = []
        self.reasons: Counter[str] = Counter()
        self.unknown_fields: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._facts = facts
        self._max_bad_fraction = max_bad_fraction
        self._strict = strict
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, DataError):
            self._write(None if error is None else str(error))
        self._spool.close()

    @property
    def total(self) -> Count:
        return Count(*(sum(column) for column in zip(*(asdict(c).values() for c in self.splits.values()), strict=True)))

    def count(self, split: str) -> Count:
        return self.splits.setdefault(split, Count())

    def list(self, split: str, where: str, reason: str) -> None:
        """One record that could not be used.

        Raises:
            DataError: there are too many of them.
        """
        where, reason = (text.encode("utf-8", "backslashreplace").decode() for text in (where, reason))
        self.count(split).listed += 1
        self.reasons[re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "...", reason)] += 1
        row = json.dumps({"split": split, "where": where, "reason": reason})
        self._spool.write(f"{row}\n")
        if len(self.first) < FIRST:
            self.first.append(f"{split}: {where}: {reason}")
        if self._strict:
            raise DataError(f"{self.first[0]} (--strict); nothing was written but {self.path}")
        total = self.total
        if total.listed >= self._max_bad_fraction * max(total.records, MIN_SEEN) + 1:
            raise self._too_many()

    def finish(self) -> None:
        """All records were seen.

        Raises:
            DataError: too many of them could not be used.
        """
        total = self.total
        if total.listed > self._max_bad_fraction * total.records:
            raise self._too_many()

    def _too_many(self) -> DataError:
        total = self.total
        return DataError(
            f"{total.listed} of {total.records} records cannot be used, more than --max-bad-fraction "
            f"{self._max_bad_fraction} allows: {'; '.join(self.first)}{', ...' * (total.listed > len(self.first))}. "
            f"Nothing was written but {self.path}, which lists them"
        )

    def _write(self, error: str | None) -> None:
        """The file, whole or not at all; the list is copied row by row."""
        head = {
            **self._facts,
            "status": "complete" if error is None else "stopped",
            "error": error,
            "splits": {name: asdict(count) for name, count in self.splits.items()},
            "reasons": dict(sorted(self.reasons.items())),
            "unknown_fields": dict(sorted(self.unknown_fields.items())),
            "notes": dict(sorted(self.notes.items())),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(head, indent=2)[:-2] + ',\n  "listed": [')
                self._spool.seek(0)
                for number, row in enumerate(self._spool):
                    stream.write(("," if number else "") + f"\n    {row.rstrip()}")
                stream.write("\n  ]\n}\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
