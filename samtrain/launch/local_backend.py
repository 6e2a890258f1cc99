"""Workers as plain processes of this machine, without Ray: one per rank, over loopback.

Each worker has a pipe of its own to the launcher: a worker killed in the middle of a message cannot block the
others. When one fails, the others get a moment to report, then they are killed; nothing outlives the launcher.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

from samtrain.core.errors import Terminated
from samtrain.core.events import Emit, message
from samtrain.core.stopping import request_stop, stop_on_sigterm
from samtrain.launch.failures import death_of, describe_exit, failure_of
from samtrain.launch.stop_request import StopRequest
from samtrain.launch.worker import Message, Outcome, Worker, restarting, run_and_report

if TYPE_CHECKING:  # light at run time: workers import this module before their environment is set
    from samtrain.recipe import Recipe

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 10.0  # how long the other ranks may take to fail on their own after the first
_ORPHAN_SECONDS = 60.0  # a worker whose launcher died saves and ends within this time


def run_local(recipe: "Recipe", *, emit: Emit, stop: StopRequest, worker: Worker | None = None) -> dict[str, Any]:
    """Run a recipe in `launch.num_workers` processes of this machine; returns rank 0's summary.

    Raises:
        ConfigError: `launch.device: cuda` with fewer GPUs than workers.
        Terminated: SIGTERM arrived; the workers saved a checkpoint, if there was a step to save.
        WorkersFailed: after `launch.max_failures` restarts, with the first failure of the last attempt.
    """
    from samtrain.launch.devices import local_gpus, with_device  # not at the top: see TYPE_CHECKING above
    from samtrain.launch.output_dir import restart_recipe

    recipe = with_device(recipe, num_gpus=local_gpus(), where="this machine", emit=emit)
    for attempt in range(1, recipe.launch.max_failures + 2):
        outcome = _run_once(recipe, emit=emit, stop=stop, worker=worker)
        origin = outcome.origin
        if origin is None or not origin.is_retryable or stop.count or attempt > recipe.launch.max_failures:
            break
        emit(restarting(origin, attempt=attempt, max_failures=recipe.launch.max_failures))
        recipe = restart_recipe(recipe)
    return outcome.result()


def _run_once(recipe: "Recipe", *, emit: Emit, stop: StopRequest, worker: Worker | None) -> Outcome:
    context = multiprocessing.get_context("spawn")
    outcome, signals_sent, killed = Outcome(emit), 0, False
    processes: dict[int, SpawnProcess] = {}
    connections: dict[int, Connection] = {}
    environment = _environment(recipe)
    try:
        for rank in range(recipe.launch.num_workers):
            connections[rank], sender = context.Pipe(duplex=False)
            ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (sender, ranked, recipe.to_yaml(), worker)
            processes[rank] = context.Process(target=_worker_main, args=arguments, name=f"rank-{rank}")
            with _sigterm_held_back():
                processes[rank].start()
            sender.close()
        deadline: float | None = None
        while processes:
            wait([*connections.values(), *(p.sentinel for p in processes.values())], timeout=_POLL_SECONDS)
            for rank in list(connections):
                if not _receive(connections[rank], outcome):
                    connections.pop(rank).close()
            for rank in [rank for rank, process in processes.items() if process.exitcode is not None]:
                _ended(
                    rank,
                    processes.pop(rank),
                    connections.pop(rank, None),
                    outcome,
                    killed=killed,
                    stop=signals_sent > 0,
                )
            if outcome.failures and deadline is None:
                deadline = time.monotonic() + _REPORT_SECONDS
            if stop.count > signals_sent:
                signals_sent = stop.count
                emit(message("stopping: the workers save a checkpoint first (once more: stop at once)"))
                _signal_all(processes, at_once=signals_sent > 1)
            if deadline is not None and time.monotonic() > deadline:
                killed = True
                _kill_all(processes)
    finally:
        _kill_all(processes)
    return outcome


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """A process started here has SIGTERM blocked (the mask is inherited) until its handler stands."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _receive(connection: Connection, outcome: Outcome) -> bool:
    """Take every message that is there; False once the worker's end is closed."""
    try:
        while connection.poll():
            outcome.receive(connection.recv())
    except (EOFError, OSError):
        return False
    return True


def _ended(
    rank: int, process: SpawnProcess, connection: Connection | None, outcome: Outcome, *, killed: bool, stop: bool
) -> None:
    """Account for a worker that ended; `killed`: we ended it after another's failure; `stop`: the user did."""
    process.join()
    if connection is not None:
        _receive(connection, outcome)
        connection.close()
    code = process.exitcode or 0
    if code == 0 or killed or rank in outcome.failures:
        return
    if stop:
        error = Terminated(f"worker {rank} {describe_exit(code)} before it could save a checkpoint")
        outcome.fail(failure_of(error, rank=rank))
    else:
        outcome.fail(death_of(rank, how=describe_exit(code)))


def _signal_all(processes: dict[int, SpawnProcess], *, at_once: bool) -> None:
    for process in processes.values():
        process.kill() if at_once else process.terminate()


def _kill_all(processes: dict[int, SpawnProcess]) -> None:
    for process in processes.values():
        process.kill()


def _environment(recipe: "Recipe") -> dict[str, str]:
    """The variables that every distributed PyTorch program reads, and threads as many as the recipe grants."""
    launch = recipe.launch
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(launch.num_workers),
        "LOCAL_WORLD_SIZE": str(launch.num_workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(launch.cpus_per_worker)),
    }
    if launch.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def _worker_main(sender: Connection, environment: dict[str, str], recipe_yaml: str, worker: Worker | None) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher passes it on once
    stop_on_sigterm()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    lock = threading.Lock()

    def send(outgoing: Message) -> None:
        try:
            with lock:
                sender.send(outgoing)
        except OSError:  # the launcher is gone; nobody watches any more
            pass

    code = run_and_report(worker, recipe_yaml, rank=int(environment["RANK"]), send=send)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the work is done or lost, and a process group's destructors would wait for ranks that are gone.
    os._exit(code)


def _end_with_the_launcher() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        request_stop()
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)
