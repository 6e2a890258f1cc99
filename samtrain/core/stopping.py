"""Stopping early and cleanly: one flag per process, set from outside, read by the engine at the end of every step.

SIGTERM sets it (`stop_on_sigterm`); so does the Ray launcher, whose workers train in a thread, where Python
delivers no signals. All ranks must agree before they act on it: a rank may learn of it one step after the others.
"""

import signal
import threading
from types import FrameType

_requested = threading.Event()


def request_stop() -> None:
    """Ask this process to save a checkpoint after the step it is in, and to end. Safe in signal handlers."""
    _requested.set()


def stop_requested() -> bool:
    return _requested.is_set()


def clear_stop() -> None:
    """Forget the request: for a process that starts another run."""
    _requested.clear()


def stop_on_sigterm() -> None:
    """Let SIGTERM set the flag. Does nothing outside the main thread: whoever made that thread sets the flag itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    request_stop()
