"""One checkpoint on its way to disk while training goes on: a thread on every rank, and no collective calls.

Each rank's thread writes its own files. That of the publishing rank then waits until it sees the files of all in the
shared folder, and makes the checkpoint complete. So a checkpoint that was begun becomes complete also where training
ends in an error meanwhile, on whatever ranks; where a rank dies before it has written, it never does.
"""

import threading
from collections.abc import Callable

POLL_SECONDS = 0.1


class BackgroundSave:
    """Starts at once.

    Args:
        write: this rank's files; from here on nothing of the run may be read that training changes.
        is_written_by_all, publish: on the publishing rank, what it looks for after its own `write`, and does then.
    """

    def __init__(
        self,
        write: Callable[[], None],
        *,
        is_written_by_all: Callable[[], bool] | None = None,
        publish: Callable[[], None] | None = None,
    ) -> None:
        self._write, self._is_written_by_all, self._publish = write, is_written_by_all, publish
        self._written, self._given_up = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="samtrain-save", daemon=True)
        self._thread.start()

    @property
    def has_news(self) -> bool:
        """This rank failed, or it publishes and has: the ranks should meet and end this save."""
        return self._error is not None or (self._publish is not None and not self._thread.is_alive())

    def wait_written(self) -> None:
        """Until this rank's files are on disk; raises what writing raised."""
        self._written.wait()
        self._raise()

    def wait_published(self) -> None:
        """Until the checkpoint is complete, on the publishing rank; raises what publishing raised."""
        self._thread.join()
        self._raise()

    def wait_or_give_up(self, seconds: float) -> None:
        """Until all is done, or `seconds` after this rank's files were written: another rank's may never come."""
        self._written.wait()
        self._thread.join(seconds)
        self.give_up()

    def give_up(self) -> None:
        """Wait for other ranks no longer."""
        self._given_up.set()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self._error = error
            return
        finally:
            self._written.set()
        if self._publish is None or self._is_written_by_all is None:
            return
        try:
            while not self._is_written_by_all():
                if self._given_up.wait(POLL_SECONDS):
                    return
            self._publish()
        except Exception as error:
            self._error = error
