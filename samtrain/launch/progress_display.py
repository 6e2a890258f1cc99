"""What the person who started the run sees: the plan, one live line, messages, tables, the summary.

On a terminal the current step is one line that rewrites itself; elsewhere (a log file, `ray job logs`) steps are
plain lines, at most one a second.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from samtrain.core.events import Event

_SECONDS_BETWEEN_LINES = 1.0
_WIDTH_WITHOUT_TERMINAL = 140

# metric -> label and format, in the order shown
_SHOWN: tuple[tuple[str, str, str], ...] = (
    ("train/loss", "loss", "{:.4f}"),
    ("train/learning_rate", "lr", "{:.2e}"),
    ("perf/images_per_s_per_gpu", "images/s/worker", "{:.1f}"),
    ("perf/tokens_per_s_per_gpu", "tokens/s/worker", "{:.0f}"),
    ("memory/max_reserved_gib", "memory", "{:.2f} GiB"),
)


def make_console() -> Console:
    """Standard output; wide enough for tables where there is no terminal to ask."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)


class ProgressDisplay:
    """Renders events; `handle` is an `Emit`. Use as a context manager, so that the terminal is left in order."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic):
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._last_line = float("-inf")
        self._held_back: str | None = None

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end_line()

    def handle(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "step":
            self._line(_step_line(event), is_last=event["step"] == event.get("max_steps"))
        elif kind == "progress":
            done, total = event["done"], event["total"]
            self._line(f"{event['what']} {done}/{total}", is_last=done == total)
        elif kind == "message":
            style = "yellow" if event["level"] == "warning" else ""
            prefix = "warning: " if event["level"] == "warning" else ""
            self._print(Text(prefix + event["text"], style=style))
        elif kind == "eval":
            self._print_table(event["title"], event["columns"], event["rows"])
        elif kind in ("plan", "summary"):
            self._print_table(event["title"], None, event["rows"])

    def _line(self, text: str, *, is_last: bool) -> None:
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8, transient=False)
                self._live.start()
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
            if is_last:
                self._end_line()
            return
        if is_last or self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line, self._held_back = self._clock(), None
            self._console.print(Text(text), soft_wrap=True)
        else:
            self._held_back = text

    def _print(self, renderable: Any) -> None:
        self._release()
        self._console.print(renderable, soft_wrap=isinstance(renderable, Text))  # above the live line, if there is one

    def _print_table(self, title: str, columns: list[str] | None, rows: list[list[Any]]) -> None:
        self._print(Text(title, style="bold"))  # a table wraps its own title to its width
        self._print(_table(columns, rows))

    def _end_line(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._release()

    def _release(self) -> None:
        """Print the line that throttling held back: what follows it, or the end of the log, would be misread."""
        if self._held_back is not None:
            self._console.print(Text(self._held_back), soft_wrap=True)
            self._held_back = None


def _step_line(event: Event) -> str:
    total = f"/{event['max_steps']}" if event.get("max_steps") else ""
    parts = [f"step {event['step']}{total}"]
    metrics: dict[str, float] = event.get("metrics", {})
    parts += [f"{label} {form.format(metrics[name])}" for name, label, form in _SHOWN if name in metrics]
    if event.get("eta_seconds") is not None:
        parts.append(f"ETA {_duration(event['eta_seconds'])}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _table(columns: list[str] | None, rows: list[list[Any]]) -> Table:
    table = Table(show_header=columns is not None)
    for number, column in enumerate(columns or ["", ""]):
        numeric = columns is not None and number > 0
        table.add_column(str(column), overflow="fold", justify="right" if numeric else "left", no_wrap=False)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
