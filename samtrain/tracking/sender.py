"""The thread that carries a spool to a server: tries, waits, says when the server is down and when it is back."""

import threading
import time
from collections.abc import Callable

from samtrain.tracking.spool import Operation, Spool

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.5, 30.0
# A request costs about as much for many points as for one: let a few steps gather.
_GATHER_SECONDS = 0.5


class Sender:
    """Sends what is in the spool, in order, for as long as it lives.

    Args:
        send: delivers and acknowledges operations; raises where the server cannot be reached. Only the thread calls it.
        on_down, on_back: called by the thread once for each outage.
    """

    def __init__(
        self,
        spool: Spool,
        send: Callable[[list[tuple[Operation, int]]], None],
        *,
        on_down: Callable[[Exception], None],
        on_back: Callable[[], None],
    ) -> None:
        self._spool, self._send, self._on_down, self._on_back = spool, send, on_down, on_back
        self._wake, self._closing, self._give_up = threading.Event(), threading.Event(), threading.Event()
        self._is_down = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._run, name="tracking-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Say that something was appended."""
        self._wake.set()

    def finish(self, *, patience_seconds: float, is_uploading: Callable[[], bool] = lambda: False) -> None:
        """Wait until everything is sent; gives up when nothing has arrived for `patience_seconds`.

        While operations get through there is no limit, nor within the upload of one file: a large model takes its
        minutes, and a dead connection ends by its own timeout.
        """
        self._closing.set()
        self._wake.set()
        position, since = self._spool.state.acknowledged, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(timeout=0.1)
            if self._spool.state.acknowledged != position:
                position, since = self._spool.state.acknowledged, time.monotonic()
            elif time.monotonic() - since > patience_seconds and not is_uploading():
                self._give_up.set()
                self._thread.join(timeout=1.0)  # it may hang inside a request; as a daemon it ends with the process
                return

    def _run(self) -> None:
        while not self._give_up.is_set():
            operations = self._spool.read()
            if operations:
                self._try(operations)
            elif self._closing.is_set():
                return
            else:
                self._wake.wait()
                self._wake.clear()
                self._closing.wait(_GATHER_SECONDS)

    def _try(self, operations: list[tuple[Operation, int]]) -> None:
        try:
            self._send(operations)
        except Exception as error:  # whatever it is: training goes on, and the spool keeps what was not sent
            if not self._is_down:
                self._is_down = True
                self._on_down(error)
            closing = self._closing.is_set()
            (self._give_up if closing else self._closing).wait(min(self._pause_seconds, 1.0 if closing else 1e9))
            self._pause_seconds = min(2 * self._pause_seconds, _LAST_PAUSE_SECONDS)
        else:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
            if self._is_down:
                self._is_down = False
                self._on_back()
