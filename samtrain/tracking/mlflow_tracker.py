"""MLflow behind a journal: training never waits for the tracking server, and nothing logged is lost.

    caller --append--> Spool (a local file) --read--> sender thread --MlflowClient--> server or embedded SQLite

Every call writes one operation with its own time to the spool and returns. One thread sends the operations in
order, many metrics in one request, and acknowledges what has arrived. A server that is down, also at the start,
costs one warning: the operations stay on disk, the thread tries again with growing pauses, and says when it is back.
`finish` waits until everything has arrived; while the server is down only for `patience_seconds`.

Sending an operation twice is harmless, because an answer can get lost after the server has done its work: a run is
found again by its launch tag, metric points keep the time of the call (MLflow stores an equal point once), tables
are skipped where they exist, everything else overwrites itself. A resumed run appends to its own run id; points that
it makes again with equal values are not written a second time.

This is the only module that imports mlflow.
"""

import contextlib
import getpass
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samtrain.core.errors import InputError
from samtrain.core.events import Emit, message
from samtrain.core.log import logger
from samtrain.core.versions import git_commit
from samtrain.tracking.examples import example_columns, load_columns
from samtrain.tracking.names import flatten, safe_artifact_file, safe_keys
from samtrain.tracking.options import TrackingOptions
from samtrain.tracking.protocol import Example, RunStatus
from samtrain.tracking.sender import Sender
from samtrain.tracking.spool import Operation, Spool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAUNCH_TAG = "samtrain.launch_id"
# Limits of MLflow's API: points and other entries a request, characters of a parameter and of a digest.
_MAX_METRICS, _MAX_ENTITIES, _MAX_PARAM_LENGTH, _MAX_DIGEST = 1000, 100, 6000, 36
_PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")


class MlflowTracker:
    """A `Tracker` of one MLflow run; to be made on rank 0 only.

    Args:
        options: the recipe's section; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_ID win over it.
        run_name: shown in the UI.
        spool_folder: where the journal lives, on a local or shared disk that outlives the process.
        default_store: folder of the embedded store (`mlflow.db`), used where no URI is given, and of the artifacts
            (`mlartifacts/`) of a database that no server stands before.
        run_id: the run to append to (from a checkpoint). None: a new one, or with `resume` the spool's own.
        resume: this launch goes on with the run whose journal may lie in `spool_folder`. Otherwise a journal found
            there belongs to another run and is set aside.
        emit: hears warnings; None = the logger.
        patience_seconds: how long `finish` waits for a server that is down.
    """

    def __init__(
        self,
        options: TrackingOptions,
        *,
        run_name: str,
        spool_folder: str | Path,
        default_store: str | Path,
        run_id: str | None = None,
        resume: bool = False,
        emit: Emit | None = None,
        patience_seconds: float = 20.0,
    ) -> None:
        self._emit = emit
        self._patience_seconds = patience_seconds
        self._spool = Spool(spool_folder)
        self._lock, self._finished = threading.Lock(), False
        self._http_settings = _impatient_http()
        store = Path(default_store).absolute()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or options.tracking_uri
        self.tracking_uri = uri or f"sqlite:///{store / 'mlflow.db'}"
        run_id = os.environ.get("MLFLOW_RUN_ID") or run_id
        self._adopt_or_set_aside(run_id, resume=resume or run_id is not None)
        known = run_id or self._spool.state.run_id
        self._writer = _Writer(self.tracking_uri, self._spool, run_id=known, warn=self._warn)
        self._sender = Sender(self._spool, self._send, on_down=self._on_down, on_back=self._on_back)
        self._wants_monitor, self._monitor, self._resumed = options.system_metrics, None, known is not None
        if uri is None:
            store.mkdir(parents=True, exist_ok=True)
        self._append(
            "open",
            run_id=known,
            experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or options.experiment_name,
            artifact_location=_artifact_location(self.tracking_uri, default_store=store),
            run_name=run_name,
            launch_id=uuid.uuid4().hex,
            tags={"mlflow.user": _user(), "mlflow.source.name": "samtrain", "mlflow.source.git.commit": git_commit()},
        )
        _import_mlflow()
        self._http_settings.__enter__()
        self._sender.start()

    @property
    def run_id(self) -> str | None:
        return self._writer.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._append("params", values=safe_keys(flatten(params)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", values={key: str(value) for key, value in safe_keys(tags).items()})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._append("metrics", values={k: float(v) for k, v in safe_keys(metrics).items()}, step=int(step))

    def log_dataset(self, *, name: str, digest: str, path: str, num_samples: int) -> None:
        self._append("dataset", name=name, digest=digest, path=str(path), num_samples=int(num_samples))

    def log_artifact(self, path: str | Path, *, artifact_path: str | None = None) -> None:
        folder = None if artifact_path is None else safe_artifact_file(artifact_path)
        self._append("artifact", path=self._spool.stored_path(path), folder=folder)

    def log_text(self, text: str, artifact_file: str) -> None:
        self._append("text", text=text, file=safe_artifact_file(artifact_file))

    def log_figure(self, figure: "Figure", artifact_file: str) -> None:
        file = Path(safe_artifact_file(artifact_file))
        path = self._spool.new_file(file.name)
        figure.savefig(path, dpi=120)
        self.log_artifact(path, artifact_path=str(file.parent) if file.parent != Path(".") else None)

    def log_examples(self, examples: Sequence[Example], *, artifact_file: str) -> None:
        if examples:
            columns = example_columns(examples, spool=self._spool)
            self._append("table", columns=columns, file=safe_artifact_file(artifact_file))

    def log_model_folder(self, path: str | Path, *, artifact_path: str = "model") -> None:
        # One operation a file: an outage in the middle of a large model repeats one file, not all.
        folder = Path(path)
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            below = file.parent.relative_to(folder).as_posix()
            self.log_artifact(file, artifact_path=f"{artifact_path}/{below}" if below != "." else artifact_path)

    def finish(self, status: RunStatus) -> None:
        """End the run and wait for the sender. A second call does nothing.

        While something arrives there is no limit (a model may take minutes); when nothing has for
        `patience_seconds`, the rest stays in the spool and a warning says where, and how to send it.
        """
        if self._finished:
            return
        if self._monitor is not None:
            self._monitor.finish()
        with self._lock:
            self._append("finish", status=status)
            self._finished = True
        self._sender.finish(patience_seconds=self._patience_seconds, is_uploading=lambda: self._writer.is_uploading)
        self._http_settings.__exit__(None, None, None)
        if self._spool.is_drained:
            self._spool.delete()
            return
        self._warn(
            f"MLflow at {_redact(self.tracking_uri)} does not answer: what it missed lies in {self._spool.folder}; "
            f"once it is back run `python -m samtrain.tracking.replay {self._spool.folder}`"
        )

    def _send(self, operations: list[tuple[Operation, int]]) -> None:
        self._writer.send(operations)
        if self._wants_monitor:
            self._wants_monitor = False
            try:
                self._monitor = _system_monitor(self, resume=self._resumed)
            except Exception as error:  # no reason to stop sending
                self._warn(f"system metrics are not collected: {_short(error)}")

    def _on_down(self, error: Exception) -> None:
        self._warn(
            f"MLflow at {_redact(self.tracking_uri)} does not take what is logged; training goes on, "
            f"everything is kept in {self._spool.folder} and sent when it is back ({_short(error)})"
        )

    def _on_back(self) -> None:
        self._warn(f"MLflow at {_redact(self.tracking_uri)} is back; what it missed was sent", level="info")

    def _append(self, op: str, **values: Any) -> None:
        if self._finished:
            self._warn(f"`{op}` was logged after the run's end and is dropped")
            return
        self._spool.append({"op": op, "time": int(time.time() * 1000), **values})
        self._sender.wake()

    def _adopt_or_set_aside(self, run_id: str | None, *, resume: bool) -> None:
        owner = self._spool.state.run_id
        if resume and (owner is None or run_id is None or owner == run_id):
            return
        if self._spool.is_drained:
            self._spool.delete()
            self._spool = Spool(self._spool.folder)
            return
        aside = self._spool.set_aside()
        self._warn(
            f"an earlier run left metrics that MLflow never got; kept in {aside}: "
            f"`python -m samtrain.tracking.replay {aside}` sends them"
        )

    def _warn(self, text: str, *, level: str = "warning") -> None:
        if self._emit is not None:
            self._emit(message(text, level=level))
        else:
            (logger.warning if level == "warning" else logger.info)(text)


class _Writer:
    """Applies operations to an MLflow store, in order; knows nothing of threads or retries.

    `send` raises where the store is unreachable; what it refuses for good (an invalid value, a file that is gone)
    is reported and left out, or one bad operation would hold up all that follow.
    """

    def __init__(self, tracking_uri: str, spool: Spool, *, run_id: str | None, warn: Any) -> None:
        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.is_uploading = False  # inside the request for one file, however large
        self._spool, self._warn = spool, warn
        self._client: Any = None
        self._steps_held: dict[str, int] = {}  # metric -> its last step in a run that was there before us
        self._points_held: dict[str, set[tuple[int, str]]] = {}
        self._refused_kinds: set[str] = set()

    def send(self, operations: list[tuple[Operation, int]]) -> None:
        """Send and acknowledge operations with the spool's position after each."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.tracking_uri)
        for batch, position in _batches(operations):
            try:
                getattr(self, f"_do_{batch[0]['op']}", self._do_unknown)(batch)
            except Exception as error:
                if batch[0]["op"] == "open" or not _is_permanent(error):
                    raise
                self._refused(batch[0]["op"], error)
            self._spool.acknowledge(position, run_id=self.run_id, tracking_uri=_redact(self.tracking_uri))

    def _refused(self, op: str, error: Exception) -> None:
        if op not in self._refused_kinds:  # a run that was deleted refuses everything: one warning of a kind
            self._refused_kinds.add(op)
            self._warn(f"MLflow refused `{op}`, which is left out of the run: {_short(error)}")

    def _do_unknown(self, batch: list[Operation]) -> None:
        raise ValueError(f"the spool holds an operation nobody knows: {str(batch[0])[:200]}")

    def _do_open(self, batch: list[Operation]) -> None:
        (operation,) = batch
        wanted = operation["run_id"] or self.run_id
        if wanted is not None and self._reopen(wanted):
            return
        tags = {**operation["tags"], LAUNCH_TAG: operation["launch_id"]}
        experiment_id = self._experiment(operation)
        found = self._client.search_runs([experiment_id], f"tags.`{LAUNCH_TAG}` = '{operation['launch_id']}'")
        run = found[0] if found else None
        if run is None:
            run = self._client.create_run(
                experiment_id, start_time=operation["time"], run_name=operation["run_name"], tags=tags
            )
        self.run_id = run.info.run_id

    def _reopen(self, run_id: str) -> bool:
        """Go on with an existing run; False where the store does not know it."""
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", None) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            self._warn(f"MLflow has no run {run_id} to append to; a new run is made ({_short(error)})")
            return False
        self.run_id = run_id
        for metric in run.data._metric_objs:
            self._steps_held[metric.key] = metric.step
        self._client.update_run(run_id, status="RUNNING")
        return True

    def _experiment(self, operation: Operation) -> str:
        name = operation["experiment"]
        for _ in range(2):
            if (found := self._client.get_experiment_by_name(name)) is not None:
                return found.experiment_id
            with contextlib.suppress(Exception):  # another run may have made it between the two calls
                return self._client.create_experiment(name, artifact_location=operation["artifact_location"])
        raise RuntimeError(f"cannot find or make the experiment {name!r}")

    def _do_metrics(self, batch: list[Operation]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, operation["time"], operation["step"])
            for operation in batch
            for key, value in operation["values"].items()
            if not self._is_held(key, operation["step"], value)
        ]
        for chunk in _chunks(metrics, _MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=chunk)

    def _is_held(self, key: str, step: int, value: float) -> bool:
        """True for a point that a resumed run makes again with an equal value."""
        if step > self._steps_held.get(key, -1):
            return False
        if key not in self._points_held:
            history = self._client.get_metric_history(self.run_id, key)
            self._points_held[key] = {(point.step, repr(float(point.value))) for point in history}
        return (step, repr(value)) in self._points_held[key]

    def _do_params(self, batch: list[Operation]) -> None:
        from mlflow.entities import Param

        (operation,) = batch
        # A parameter cannot change in MLflow: a resumed run keeps the first value, and what differs is said.
        held = self._client.get_run(self.run_id).data.params
        values = {key: value[:_MAX_PARAM_LENGTH] for key, value in operation["values"].items()}
        changed = {key: value for key, value in values.items() if held.get(key, value) != value}
        if changed:
            shown = ", ".join(f"{key}: {held[key]} -> {value}" for key, value in list(changed.items())[:5])
            self._warn(f"this launch differs from the run's parameters in MLflow, which keep the first value: {shown}")
        new = [Param(key, value) for key, value in values.items() if key not in held]
        for chunk in _chunks(new, _MAX_ENTITIES):
            self._client.log_batch(self.run_id, params=chunk)

    def _do_tags(self, batch: list[Operation]) -> None:
        from mlflow.entities import RunTag

        (operation,) = batch
        for chunk in _chunks([RunTag(key, value) for key, value in operation["values"].items()], _MAX_ENTITIES):
            self._client.log_batch(self.run_id, tags=chunk)

    def _do_dataset(self, batch: list[Operation]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        (o,) = batch
        dataset = Dataset(
            name=o["name"],
            digest=o["digest"][:_MAX_DIGEST],
            source_type="local",
            source=json.dumps({"uri": o["path"]}),
            profile=json.dumps({"num_samples": o["num_samples"], "digest": o["digest"]}),
        )
        inputs = [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])]
        self._client.log_inputs(self.run_id, datasets=inputs)

    def _do_artifact(self, batch: list[Operation]) -> None:
        (operation,) = batch
        path = self._spool.real_path(operation["path"])
        if not path.is_file():
            raise FileNotFoundError(f"{path} is gone")
        self.is_uploading = True
        try:
            self._client.log_artifact(self.run_id, str(path), artifact_path=operation["folder"])
        finally:
            self.is_uploading = False

    def _do_text(self, batch: list[Operation]) -> None:
        (operation,) = batch
        self._client.log_text(self.run_id, operation["text"], operation["file"])

    def _do_table(self, batch: list[Operation]) -> None:
        (operation,) = batch
        file = operation["file"]
        folder = str(Path(file).parent) if "/" in file else None
        # log_table appends to a table that exists: one that arrived although its answer got lost would double.
        if file not in [entry.path for entry in self._client.list_artifacts(self.run_id, folder)]:
            self._client.log_table(self.run_id, load_columns(operation["columns"], spool=self._spool), file)

    def _do_finish(self, batch: list[Operation]) -> None:
        (operation,) = batch
        self._client.set_terminated(self.run_id, status=operation["status"], end_time=operation["time"])


def replay(spool_folder: str | Path, tracking_uri: str | None = None) -> str:
    """Send a spool that an outage or a crash left behind, then delete it; returns the run's id.

    Args:
        spool_folder: as the warning named it. Its run must not be running any more.
        tracking_uri: default: MLFLOW_TRACKING_URI, else where the run was going.

    Raises:
        InputError: no spool there, no server known, or it does not answer (the spool stays).
    """
    spool = Spool(spool_folder)
    if not spool.path.exists():
        raise InputError(f"{spool_folder}: no spool here (expected {spool.path})")
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or spool.state.tracking_uri
    if not uri:
        raise InputError(
            f"{spool_folder}: the run never reached a server; name one: --tracking-uri or MLFLOW_TRACKING_URI"
        )
    _import_mlflow()
    writer = _Writer(uri, spool, run_id=spool.state.run_id, warn=logger.warning)
    try:
        with _impatient_http():
            while operations := spool.read():
                writer.send(operations)
    except Exception as error:
        raise InputError(
            f"MLflow at {_redact(uri)} does not answer; {spool.folder} is kept: {_short(error)}"
        ) from error
    spool.delete()
    return str(writer.run_id)


def _import_mlflow() -> None:
    """Import what the sender thread will use, in the caller's thread: two threads importing at once can see halves.

    Usage statistics stay off unless the user asks for them: nobody agreed to their leaving the cluster.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow.system_metrics.system_metrics_monitor
    import mlflow.tracking  # noqa: F401


def _system_monitor(tracker: MlflowTracker, *, resume: bool) -> Any:
    """MLflow's own monitor of CPU, memory, disk, network and GPUs, reporting through the tracker's journal."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    class Monitor(SystemMetricsMonitor):
        def monitor(self) -> None:
            # MLflow's loop asks the server at every sample and ends when it does not answer.
            while not self._shutdown_event.is_set():
                for _ in range(self.samples_before_logging):
                    self.collect_metrics()
                    if self._shutdown_event.wait(self.sampling_interval):
                        return
                self.publish_metrics(self.aggregate_metrics())

        def publish_metrics(self, metrics: dict[str, float]) -> None:
            with tracker._lock:  # finish() must not end the run between the check and the call
                if tracker._finished:
                    return
                named = {self._metrics_prefix + name: value for name, value in metrics.items()}
                tracker.log_metrics(named, step=self._logging_step)
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

        def finish(self) -> None:
            self._shutdown_event.set()
            self._process.join()

    monitor = Monitor(tracker.run_id, resume_logging=resume, tracking_uri=tracker.tracking_uri)
    monitor.start()
    return monitor


def _batches(operations: list[tuple[Operation, int]]) -> Iterator[tuple[list[Operation], int]]:
    """Neighbouring metrics together, up to one request; everything else alone; with the position after each batch."""
    batch: list[Operation] = []
    size = position = 0
    for operation, end in operations:
        points = len(operation.get("values", ()))
        if batch and (operation["op"] != "metrics" or batch[0]["op"] != "metrics" or size + points > _MAX_METRICS):
            yield batch, position
            batch, size = [], 0
        batch.append(operation)
        size, position = size + points, end
    if batch:
        yield batch, position


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _is_permanent(error: Exception) -> bool:
    """Whether asking again is useless: the store answered and refused, or what was to be sent is not there or wrong."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, MlflowException):
        # A proxy's bare 404 or 400 while the server restarts is no RestException: that is not the store speaking.
        spoken_by_the_store = isinstance(error, RestException) or "API request" not in str(error)
        return spoken_by_the_store and error.error_code in _PERMANENT
    if isinstance(error, OSError):  # the network's errors are OSErrors too
        return isinstance(error, FileNotFoundError)
    return isinstance(error, (ValueError, TypeError, KeyError, AttributeError))


@contextlib.contextmanager
def _impatient_http() -> Iterator[None]:
    """Let a request fail at the first or second attempt (MLflow's defaults try for minutes): retrying is our work.

    What the user set stays. The timeout of a request stays MLflow's: a server may need a minute to store a large file
    after it has taken it, and only the sender thread ever waits.
    """
    ours = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"}
    added = [name for name in ours if name not in os.environ]
    os.environ.update({name: ours[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _artifact_location(tracking_uri: str, *, default_store: Path) -> str | None:
    """Where a new experiment keeps its artifacts; None: a server, or a store in a folder, decides.

    MLflow's own default for a database is `mlruns/` in whatever folder the process was started from. Artifacts of an
    SQLite file lie beside it.
    """
    scheme, _, rest = tracking_uri.partition("://")
    if scheme.partition("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
        return None
    path = rest.partition("?")[0].removeprefix("/")  # sqlite:///relative.db, sqlite:////absolute.db
    folder = Path(path).absolute().parent if scheme == "sqlite" and path not in ("", ":memory:") else default_store
    return (folder / "mlartifacts").as_uri()


def _short(error: Exception) -> str:
    lines = _redact(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _redact(text: str) -> str:
    """Without user name and password of URLs."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        return "unknown"
