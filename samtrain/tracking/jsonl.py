"""`logging.jsonl`: every metric of a run, one JSON object a line, whatever happens to a tracking server.

A line is {"step": 10, "time": "2025-01-31T12:00:00+00:00", "train/loss": 2.31, ...}. Numbers that JSON does not
know are written as the strings "NaN", "Infinity" and "-Infinity", so that any reader can parse every line.
"""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from samtrain.core.files import atomic_write

FILE_NAME = "logging.jsonl"


class JsonlLog:
    """Appends to one file and flushes every line.

    Args:
        path: the file; its folder is made.
        resumed_step: the step a checkpoint was loaded at: later lines, which will be made again, are removed, and so
            is a line that a crash cut off. None starts the file anew.
    """

    def __init__(self, path: str | Path, *, resumed_step: int | None = None) -> None:
        self.path = Path(path)
        kept = [] if resumed_step is None else [row for row in read_rows(path) if row["step"] <= resumed_step]
        atomic_write(self.path, "".join(_line(row) for row in kept))
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._stream.write(_line({"step": step, "time": now, **{k: float(v) for k, v in metrics.items()}}))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, numbers as floats again; empty where there is no file. A cut-off last line is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(
                {key: _SPECIAL.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
            )
    return rows


_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _line(row: dict[str, Any]) -> str:
    values = {k: _spell(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
