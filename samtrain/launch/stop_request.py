"""SIGTERM and Ctrl-C in the launcher: noted here, acted upon by the backend's loop.

The first asks the workers to save a checkpoint and end; the second ends them at once.
"""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Counts the signals received while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """(Again) take the two signals: libraries that a backend starts may have taken them."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
