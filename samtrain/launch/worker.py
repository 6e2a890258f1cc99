"""What runs in every worker process, whatever started it: the training entry, with its outcome reported.

Messages to the launcher are small dictionaries: {"type": "event", "event": ...} from rank 0 only,
{"type": "result", "rank", "summary"} and {"type": "failure", "rank", ...fields of WorkerFailure}.
"""

from collections.abc import Callable
from typing import Any

from samtrain.core.errors import EXIT_SUCCESS, EXIT_TERMINATED, SamtrainError, Terminated
from samtrain.core.events import Event, discard, message
from samtrain.launch.failures import WorkerFailure, WorkersFailed, failure_of, first_failure

Message = dict[str, Any]
Worker = Callable[..., dict[str, Any]]  # (recipe_yaml: str, *, emit: Emit) -> summary


def default_worker() -> Worker:
    """`samtrain.train.run_worker`, imported where it runs: in the worker, after its environment is set."""
    from samtrain.train import run_worker

    return run_worker


def run_and_report(worker: Worker | None, recipe_yaml: str, *, rank: int, send: Callable[[Message], None]) -> int:
    """Run the worker and send what becomes of it; returns the exit code of this process. Never raises."""

    def emit(event: Event) -> None:
        send({"type": "event", "event": event})

    try:
        run = worker or default_worker()
        summary = run(recipe_yaml, emit=emit if rank == 0 else discard)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: the launcher must learn of every end
        failure = failure_of(error, rank=rank)
        send({"type": "failure", **failure.to_dict()})
        return failure.exit_code
    send({"type": "result", "rank": rank, "summary": summary})
    return EXIT_SUCCESS


class Outcome:
    """Collects the messages of one attempt of all workers."""

    def __init__(self, emit: Callable[[Event], None]):
        self._emit = emit
        self.summary: dict[str, Any] | None = None
        self.failures: dict[int, WorkerFailure] = {}

    def receive(self, received: Message) -> None:
        kind, fields = received["type"], {k: v for k, v in received.items() if k != "type"}
        if kind == "event":
            self._emit(fields["event"])
        elif kind == "result" and fields["rank"] == 0:
            self.summary = fields["summary"]
        elif kind == "failure":
            self.fail(WorkerFailure(**fields))

    def fail(self, failure: WorkerFailure) -> None:
        self.failures.setdefault(failure.rank, failure)

    @property
    def origin(self) -> WorkerFailure | None:
        return first_failure(self.failures.values()) if self.failures else None

    def result(self) -> dict[str, Any]:
        """Rank 0's summary.

        Raises:
            Terminated: the workers stopped after SIGTERM.
            WorkersFailed: with the first failure.
        """
        origin = self.origin
        if origin is not None:
            raise Terminated(origin.message) if origin.exit_code == EXIT_TERMINATED else WorkersFailed(origin)
        if self.summary is None:
            raise SamtrainError("the workers ended without a result from rank 0; see their output above")
        return self.summary


def restarting(failure: WorkerFailure, *, attempt: int, max_failures: int) -> Event:
    """What the user reads when a run starts again."""
    text = f"rank {failure.rank} failed: {failure.kind}: {failure.message.splitlines()[0] if failure.message else ''}"
    return message(f"{text}; restart {attempt} of {max_failures}, from the last checkpoint", level="warning")
