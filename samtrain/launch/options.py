"""The `launch:` section: how many processes, with what."""

from typing import Literal

from pydantic import Field

from samtrain.core.options import Options


class LaunchOptions(Options):
    """num_workers: processes; each has one GPU where the machines have GPUs.

    device: `auto` takes GPUs where there are any. max_failures: restarts from the last checkpoint after a dead worker.
    placement_timeout_seconds: how long to wait for the cluster to have room.
    """

    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_failures: int = Field(default=0, ge=0)
    placement_timeout_seconds: float = Field(default=600.0, gt=0)
