"""What went wrong, and where it began.

When one rank fails, the others fail too, a moment later, with errors about lost connections. The user needs the
first one. Every worker reports its exception with the time it was caught; `first_failure` picks the origin.
"""

import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from samtrain.core.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_TERMINATED, SamtrainError

# A process that dies without a word is noticed a little later than its peers notice its closed sockets.
_DEATH_NOTICE_SECONDS = 3.0


@dataclass(frozen=True)
class WorkerFailure:
    """One rank's end.

    time: seconds since the epoch. for_users: the message alone says everything (a SamtrainError).
    """

    rank: int
    time: float
    kind: str
    message: str
    traceback: str
    exit_code: int
    for_users: bool

    @property
    def is_retryable(self) -> bool:
        """False where a restart would only repeat it (bad input) or was not wanted (SIGTERM)."""
        return self.exit_code not in (EXIT_BAD_INPUT, EXIT_TERMINATED)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def failure_of(error: BaseException, *, rank: int) -> WorkerFailure:
    """Describe an exception in the worker that caught it, so that it can travel."""
    for_users = isinstance(error, SamtrainError)
    exit_code = error.exit_code if isinstance(error, SamtrainError) else EXIT_FAILURE
    text = "".join(traceback.format_exception(error))
    return WorkerFailure(rank, time.time(), type(error).__name__, str(error), text, exit_code, for_users)


def death_of(rank: int, *, how: str, noticed: float | None = None) -> WorkerFailure:
    """A worker that ended without reporting: killed, out of memory, or gone with its node."""
    noticed = time.time() if noticed is None else noticed
    message = f"worker {rank} {how}; no message from it (killed from outside, out of memory, or its node is gone)"
    return WorkerFailure(rank, noticed - _DEATH_NOTICE_SECONDS, "WorkerDied", message, "", EXIT_FAILURE, True)


def describe_exit(code: int) -> str:
    """`exited with status 3`, or `was killed by SIGKILL` for the negative codes of multiprocessing."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def first_failure(failures: Iterable[WorkerFailure]) -> WorkerFailure:
    """The origin: the earliest, real failures before ranks that only stopped as they were asked to."""
    return min(failures, key=lambda failure: (failure.exit_code == EXIT_TERMINATED, failure.time))


class WorkersFailed(SamtrainError):
    """The run failed in its workers; carries where it began."""

    def __init__(self, failure: WorkerFailure):
        super().__init__(f"rank {failure.rank}: {failure.kind}: {failure.message}")
        self.failure = failure
        self.exit_code = failure.exit_code
