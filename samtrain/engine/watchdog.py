"""A hang becomes a report and an exit code.

A thread watches how long the current phase (data, forward, backward, optimizer, save, evaluate) lasts. Past the
timeout it writes rank, phase, step, sample keys and the stacks of all threads to `hang-rank<r>.txt` and stderr, and
ends the process with code 1, so that whoever launched the run can start it again from its last checkpoint.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType


class Watchdog:
    """A context manager; inside it, `enter` names what the process does now and restarts the clock."""

    def __init__(self, *, output_dir: str | Path, rank: int, timeout_seconds: float) -> None:
        self.report_path = Path(output_dir) / f"hang-rank{rank}.txt"
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._phase: tuple[str, int, Sequence[str], float] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, phase: str, *, step: int, keys: Sequence[str] = ()) -> None:
        """A new phase begins now: update number `step` (1 is the first), on samples `keys`."""
        with self._lock:
            self._phase = (phase, step, keys, time.monotonic())

    def rest(self) -> None:
        """Nothing is timed until the next phase."""
        with self._lock:
            self._phase = None

    def __enter__(self) -> "Watchdog":
        self._closed.clear()
        self._thread = threading.Thread(target=self._watch, name="samtrain-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        interval = min(1.0, self.timeout_seconds / 4)
        while not self._closed.wait(interval):
            with self._lock:
                phase = self._phase
            if phase is not None and time.monotonic() - phase[3] > self.timeout_seconds:
                self._end(*phase)

    def _end(self, phase: str, step: int, keys: Sequence[str], since: float) -> None:
        try:
            report = self._report(phase, step, keys, since)
            sys.stderr.write(report)
            sys.stderr.flush()
            # Aside: a file system that hangs too, perhaps the cause of it all, must not keep the process.
            writer = threading.Thread(target=self._write, args=(report,), daemon=True)
            writer.start()
            writer.join(10.0)
        finally:
            os._exit(1)  # the hanging thread cannot be interrupted

    def _write(self, report: str) -> None:
        self.report_path.parent.mkdir(parents=True, exist_ok=True)
        self.report_path.write_text(report)

    def _report(self, phase: str, step: int, keys: Sequence[str], since: float) -> str:
        lines = [
            f"rank {self.rank} hangs: phase `{phase}` of step {step} has lasted {time.monotonic() - since:.0f} s "
            f"(train.timeout_seconds = {self.timeout_seconds:g})",
            f"samples: {', '.join(keys) or '(none)'}",
            "Compare the reports of all ranks: the one in another phase than the others is the cause.",
        ]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for identity, frame in sys._current_frames().items():
            lines.append(f"\nthread {names.get(identity, identity)}:")
            lines.append("".join(traceback.format_stack(frame)))
        return "\n".join(lines) + "\n"
