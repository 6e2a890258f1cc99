"""Stages as Ray Data jobs: on this machine, or on a cluster. The only module of the data part that imports ray.

Each stage is one `map_batches` over an actor pool: batches stream through workers that hold their models, results go
to the store, and only rows of keys come back. A stage takes the whole cluster, then the next one does: their resources
differ (CPUs, GPUs, a network), and a stage that is done can be looked at before the next one spends anything.
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from samtrain.core.errors import InputError, SamtrainError
from samtrain.data.mmlink.options import ExecutionOptions, StageResources
from samtrain.data.mmlink.records import Job
from samtrain.data.mmlink.stages import Row, StageWorker

_OBJECT_STORE_BYTES = 200 * 2**20  # only rows travel; the default takes 30 % of a small /dev/shm


class RaySession:
    """A Ray of this machine's own, or a cluster's; use as a context manager.

    Raises:
        InputError: there is no cluster at the address. SamtrainError: Ray does not start here.
    """

    def __init__(self, options: ExecutionOptions) -> None:
        self.options = options
        self.address = options.address or os.environ.get("RAY_ADDRESS")

    def __enter__(self) -> "RaySession":
        import ray

        quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        # Ray would start workers through `uv run` or ship the working directory; ours are importable everywhere.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if self.address:
                    ray.init(address=self.address, **quiet)
                else:
                    ray.init(
                        num_cpus=self.options.num_cpus,
                        include_dashboard=False,
                        object_store_memory=_OBJECT_STORE_BYTES,
                        **quiet,
                    )
            except Exception as error:  # ray raises many kinds, plain ones too
                if self.address:
                    raise InputError(
                        f"no Ray cluster at {self.address}: {error}; execution.backend=local runs in this process alone"
                    ) from None
                raise SamtrainError(
                    f"Ray does not start on this machine: {error}; execution.backend=local runs in this process alone"
                ) from None
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours count items of a stage
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        resources = ray.cluster_resources()
        self.num_cpus, self.num_gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
        self.num_nodes = sum(node["Alive"] for node in ray.nodes())
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()

    def run(
        self,
        jobs: Sequence[Job],
        *,
        stage: str,
        config: dict[str, Any],
        work: Path,
        resources: StageResources,
        batch_size: int,
    ) -> Iterator[list[Row]]:
        """Rows of finished batches, as they come.

        Raises:
            InputError: the cluster has no room for one worker.
        """
        import ray

        num_batches = math.ceil(len(jobs) / batch_size)
        num_workers = min(num_batches, self._num_workers(stage, resources))
        rows = [{"key": job.key, "payload": json.dumps(job.payload)} for job in jobs]
        data = ray.data.from_items(rows, override_num_blocks=num_batches)
        done = data.map_batches(
            _BatchWorker,
            fn_constructor_kwargs={"stage": stage, "config": json.dumps(config), "work": str(work)},
            batch_size=batch_size,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
        )
        for batch in done.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            yield [json.loads(row) for row in batch["row"]]

    def _num_workers(self, stage: str, resources: StageResources) -> int:
        room = self.num_cpus / resources.num_cpus
        if resources.num_gpus:
            room = min(room, self.num_gpus / resources.num_gpus)
        if room < 1:
            raise InputError(
                f"execution.stages.{stage} asks for {resources.num_cpus} CPUs and {resources.num_gpus} GPUs a worker; "
                f"Ray has {self.num_cpus:g} and {self.num_gpus:g}"
            )
        return min(int(room), resources.workers or int(room))


class _BatchWorker:
    """A `StageWorker` in the form Ray Data calls."""

    def __init__(self, *, stage: str, config: str, work: str) -> None:
        self.worker = StageWorker(stage=stage, config=json.loads(config), work=work)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        jobs = [Job(str(key), json.loads(payload)) for key, payload in zip(batch["key"], batch["payload"])]
        return {"row": [json.dumps(row) for row in self.worker.run(jobs)]}
