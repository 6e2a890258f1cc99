"""Workers on a Ray cluster through Ray Train, or on a Ray of this machine's own when no cluster is given.

Ray Train places the workers (one bundle each), makes the process group and restarts them after a failure. What the
workers say travels through a mailbox, an actor on the launcher's node: events of rank 0, every failure with its
time, and in the other direction the wish to stop. This is the only module that imports ray.
"""

import logging
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from samtrain.core.errors import InputError, SamtrainError, Terminated
from samtrain.core.events import Emit, message
from samtrain.core.stopping import clear_stop, request_stop
from samtrain.engine.checkpoint_folder import complete_checkpoints
from samtrain.launch.devices import with_device
from samtrain.launch.failures import death_of
from samtrain.launch.stop_request import StopRequest
from samtrain.launch.worker import Message, Outcome, Worker, restarting, run_and_report
from samtrain.recipe import Recipe

_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_TEARDOWN_SECONDS = 20.0  # how long Ray Train may take to end a run whose outcome is known
_OBJECT_STORE_BYTES = 200 * 2**20  # nothing large travels through it; the default takes 30 % of a small /dev/shm
# What a user sets where the job is sent from and means for the workers (never shown: it travels in the arguments).
_FORWARDED = ("MLFLOW_", "HF_", "SAMTRAIN_")


def run_on_ray(
    recipe: Recipe, *, address: str | None, emit: Emit, stop: StopRequest, worker: Worker | None = None
) -> dict[str, Any]:
    """Run a recipe on `launch.num_workers` Ray workers; returns rank 0's summary.

    Args:
        address: of a cluster; null starts a Ray of this machine's own, which ends with the run.

    Raises:
        InputError: there is no cluster at the address, or it has no room for the workers in time.
        Terminated: SIGTERM arrived; the workers saved a checkpoint.
        WorkersFailed: after `launch.max_failures` restarts, with the first failure of the last attempt.
    """
    import ray

    try:
        _connect(recipe, address=address)
        stop.install()  # ray.init takes SIGTERM
        if address is None or recipe.launch.device != "cuda":  # a cluster that grows may have the GPUs in a while
            num_gpus = int(ray.cluster_resources().get("GPU", 0))
            recipe = with_device(recipe, num_gpus=num_gpus, where="the cluster", emit=emit)
        _wait_for_room(recipe, emit=emit, stop=stop)
        return _train(recipe, emit=emit, stop=stop, worker=worker)
    finally:
        ray.shutdown()


def _connect(recipe: Recipe, *, address: str | None) -> None:
    import ray

    launch = recipe.launch
    # Ray Train tells its own story of a failure, at length, several times; ours is told once, by the launcher. Its
    # preemption watcher serves train functions that ask it, which ours does not: one process less to start.
    for part in ("CONTROLLER_STRUCTURED_LOGGING", "WORKER_STRUCTURED_LOGGING", "PREEMPTION_WATCHER"):
        os.environ.setdefault(f"RAY_TRAIN_ENABLE_{part}", "0")
    quiet: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "logging_config": ray.LoggingConfig(log_level="CRITICAL"),
    }
    if address is not None:
        _check_reachable(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise InputError(f"no Ray cluster at {address}: {error}; --local runs without one") from None
        return
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # tells its default at every start
    needed, there = launch.num_workers * launch.cpus_per_worker, os.cpu_count() or 1
    ray.init(
        address="local",
        num_cpus=max(needed, there),  # more workers than cores are slow, not wrong
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **quiet,
    )


def _check_reachable(address: str) -> None:
    """Ray itself tries an address where nothing listens for minutes."""
    host, separator, port = address.rpartition(":")
    if "//" in address:
        raise InputError(
            f"Ray address {address}: give host:port of the head; from outside the cluster, use `ray job submit`"
        )
    if not separator or not port.isdigit():
        return  # `auto`, `local`: Ray knows at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"no Ray cluster at {address}: {error}; --local runs without one") from None


# ---- room for the workers


def _bundle(recipe: Recipe) -> dict[str, float]:
    gpus = {"GPU": 1.0} if recipe.launch.device == "cuda" else {}
    return {"CPU": float(recipe.launch.cpus_per_worker), **gpus}


def _wait_for_room(recipe: Recipe, *, emit: Emit, stop: StopRequest) -> None:
    """Reserve all bundles once, so that a cluster without room is an error after a while and not a wait for ever.

    The reservation is given back at once; asking for it also tells an autoscaler what to start.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    launch, bundle = recipe.launch, _bundle(recipe)
    group = placement_group([bundle] * launch.num_workers, strategy="PACK")
    started, announced = time.monotonic(), False
    try:
        while not ray.wait([group.ready()], timeout=1.0)[0]:
            asked = f"{launch.num_workers} workers of {_resources(bundle)} each"
            waited = time.monotonic() - started
            if stop.count:
                raise Terminated("stopped while waiting for room on the cluster; nothing was trained")
            if waited > launch.placement_timeout_seconds:
                raise InputError(
                    f"the Ray cluster has no room for {asked} after {waited:.0f} s "
                    f"(launch.placement_timeout_seconds); it has {_inventory()}; "
                    f"change launch.num_workers or launch.cpus_per_worker, or add nodes"
                )
            if not announced and waited > 3:
                announced = True
                limit = f"{launch.placement_timeout_seconds:.0f} s at most"
                emit(
                    message(f"waiting for room for {asked}; the cluster has {_inventory()} ({limit})", level="warning")
                )
    finally:
        remove_placement_group(group)


def _inventory() -> str:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shown = ", ".join(_resources({k: node.get(k, 0.0) for k in ("CPU", "GPU") if k in node}) for node in nodes)
    free = ray.available_resources()
    return f"{len(nodes)} nodes ({shown}), of which free: {_resources({k: free.get(k, 0.0) for k in ('CPU', 'GPU')})}"


def _resources(values: dict[str, float]) -> str:
    return " + ".join(f"{value:g} {name}" for name, value in values.items()) or "nothing"


# ---- the run


class _Mailbox:
    """An actor between the launcher and the workers; every call returns at once or waits without a thread."""

    def __init__(self) -> None:
        import asyncio

        self._messages: list[Message] = []
        self._arrived, self._stop = asyncio.Event(), asyncio.Event()
        self._starts: dict[int, int] = {}

    async def register(self, rank: int) -> int:
        """A worker starts; returns how often this rank has started, with this time."""
        self._starts[rank] = self._starts.get(rank, 0) + 1
        return self._starts[rank]

    async def put(self, messages: list[Message]) -> None:
        self._messages += messages
        self._arrived.set()

    async def take(self, timeout_seconds: float) -> list[Message]:
        import asyncio

        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_seconds)
        except TimeoutError:
            return []
        self._arrived.clear()
        taken, self._messages = self._messages, []
        return taken

    async def stop(self) -> None:
        self._stop.set()

    async def wait_for_stop(self) -> bool:
        return await self._stop.wait()


def _train(recipe: Recipe, *, emit: Emit, stop: StopRequest, worker: Worker | None) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Mailbox)
    mailbox = actor.options(num_cpus=0, scheduling_strategy=here, max_concurrency=1000).remote()
    training = _Training(recipe, mailbox=mailbox, worker=worker)
    attempts: list[Outcome] = [Outcome(emit)]
    signals_sent, deadline = 0, None
    training.start()
    while True:
        over = not training.is_alive()  # looked at before the mailbox is emptied for the last time
        for received in ray.get(mailbox.take.remote(_POLL_SECONDS)):
            _receive(received, attempts, recipe=recipe, emit=emit)
        if over:
            break
        if stop.count > signals_sent:
            signals_sent = stop.count
            emit(message("stopping: the workers save a checkpoint first (once more: stop at once)"))
            mailbox.stop.remote()
            if signals_sent > 1:
                break
        if _is_decided(attempts[-1], recipe) and deadline is None:
            deadline = time.monotonic() + _TEARDOWN_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
    outcome = attempts[-1]
    if training.error is not None:
        _note_deaths(training.error, outcome)
    if outcome.summary is None and not outcome.failures:
        why = training.error if training.error is not None else "stopped before the workers answered"
        raise SamtrainError(f"Ray Train ended the run: {why}")
    return outcome.result()


def _receive(received: Message, attempts: list[Outcome], *, recipe: Recipe, emit: Emit) -> None:
    attempt = received.pop("attempt")
    while len(attempts) < attempt:
        failed = attempts[-1].origin
        if failed is None:
            failed = death_of(-1, how="of the group died")
        emit(restarting(failed, attempt=len(attempts), max_failures=recipe.launch.max_failures))
        attempts.append(Outcome(emit))
    if received["type"] != "started":
        attempts[attempt - 1].receive(received)


def _is_decided(outcome: Outcome, recipe: Recipe) -> bool:
    """No later message can change the outcome, whatever Ray Train still does."""
    origin = outcome.origin
    return origin is not None and (not origin.is_retryable or recipe.launch.max_failures == 0)


def _note_deaths(error: BaseException, outcome: Outcome) -> None:
    """Ranks that Ray reports as failed and that said nothing themselves: they went first, and silently."""
    silent = set(getattr(error, "worker_failures", {})) - set(outcome.failures)
    noticed = min((failure.time for failure in outcome.failures.values()), default=time.time())
    for rank in silent:
        reason = str(error.worker_failures[rank]).strip().splitlines()  # type: ignore[attr-defined]
        outcome.fail(death_of(rank, how=f"died ({reason[0] if reason else 'no reason given'})", noticed=noticed))


class _Training(threading.Thread):
    """`TorchTrainer.fit` beside the launcher's loop; `error` is what it raised."""

    def __init__(self, recipe: Recipe, *, mailbox: Any, worker: Worker | None):
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._recipe, self._mailbox, self._worker = recipe, mailbox, worker

    def run(self) -> None:
        try:
            self._trainer().fit()
        except BaseException as error:  # the loop in `_train` reports it
            self.error = error

    def _trainer(self) -> Any:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        launch, train = self._recipe.launch, self._recipe.train
        # A group that finds no room again after a node died gives up in time.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(launch.placement_timeout_seconds))
        on_restart = train.model_copy(update={"resume_from_checkpoint": "auto"})
        return TorchTrainer(
            _train_function,
            train_loop_config={
                "recipe_yaml": self._recipe.to_yaml(),
                "restart_yaml": self._recipe.model_copy(update={"train": on_restart}).to_yaml(),
                "output_dir": self._recipe.output_dir,
                "working_directory": os.getcwd(),
                "environment": {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)},
                "mailbox": self._mailbox,
                "worker": self._worker,
            },
            torch_config=TorchConfig(
                backend="nccl" if launch.device == "cuda" else "gloo", timeout_s=math.ceil(train.timeout_seconds)
            ),
            scaling_config=ScalingConfig(
                num_workers=launch.num_workers,
                use_gpu=launch.device == "cuda",
                resources_per_worker=_bundle(self._recipe),
            ),
            run_config=RunConfig(
                name=".ray",  # Ray Train keeps its own marker files in a folder of that name, on the shared storage
                storage_path=str(Path(self._recipe.output_dir).resolve()),
                failure_config=_failure_config(launch.max_failures),
            ),
        )


def _failure_config(max_failures: int) -> Any:
    from ray.train.v2.api.config import FailureConfig

    # Ray's default tries for ever to place a group that has no room any more.
    return FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures)


def _train_function(config: dict[str, Any]) -> None:
    """Runs in every Ray worker, in a thread beside the actor's own (so signals cannot be handled here)."""
    import ray
    import ray.train

    rank, mailbox = ray.train.get_context().get_world_rank(), config["mailbox"]
    if os.path.isdir(config["working_directory"]):
        os.chdir(config["working_directory"])  # relative paths in the recipe mean the same on every node
    for name, value in config["environment"].items():
        os.environ.setdefault(name, value)
    clear_stop()
    attempt = ray.get(mailbox.register.remote(rank))
    threading.Thread(target=_stop_when_told, args=(mailbox,), daemon=True).start()

    def send(outgoing: Message) -> None:
        delivered = mailbox.put.remote([{**outgoing, "attempt": attempt}])
        if outgoing["type"] != "event":  # the process may end right after: be sure that it arrived
            ray.get(delivered)

    send({"type": "started"})
    is_restart = attempt > 1 and complete_checkpoints(Path(config["output_dir"]))
    recipe_yaml = config["restart_yaml"] if is_restart else config["recipe_yaml"]
    code = run_and_report(config["worker"], recipe_yaml, rank=rank, send=send)
    if code:
        raise RuntimeError(f"rank {rank} failed; the launcher has its traceback")  # so that Ray Train ends the group


def _stop_when_told(mailbox: Any) -> None:
    import ray

    try:
        ray.get(mailbox.wait_for_stop.remote())
    except Exception:  # the mailbox is gone with the launcher: Ray ends this worker too
        return
    request_stop()
