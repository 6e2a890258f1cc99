"""What a run measures between two log lines: loss per label token, throughput per GPU, waiting, memory.

All ranks close a window together; one all-gather of three numbers makes the figures global.
"""

import resource
import time

import torch
import torch.distributed as dist
from torch import Tensor

from samtrain.core.distributed import is_distributed
from samtrain.engine.step import StepCounts


def memory_gib(device: torch.device) -> float:
    """Peak GiB so far: reserved on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Meter:
    """Adds up steps; `close` returns the window's metrics and begins a new one."""

    def __init__(self, *, device: torch.device, world_size: int) -> None:
        self.device = device
        self.world_size = world_size
        self._begin()

    def _begin(self) -> None:
        self._since = time.perf_counter()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._label_tokens = self._tokens = self._images = self._samples = self._skipped = self._steps = 0
        self._data_wait_seconds = self._paused_seconds = self._checkpoint_stall_seconds = 0.0

    def add_wait(self, seconds: float) -> None:
        """The loader kept this rank waiting."""
        self._data_wait_seconds += seconds

    def add_pause(self, seconds: float) -> None:
        """Time that is not training: saving, evaluating."""
        self._paused_seconds += seconds

    def add_checkpoint_stall(self, seconds: float) -> None:
        """The part of the pauses that was for a checkpoint."""
        self._checkpoint_stall_seconds += seconds

    def add_step(self, loss_sum: Tensor, counts: StepCounts) -> None:
        """loss_sum: 0-d, this rank's, stays on the device. counts: over all ranks."""
        self._loss_sum += loss_sum
        self._label_tokens += counts.label_tokens
        self._tokens += counts.tokens
        self._images += counts.images
        self._samples += counts.samples
        self._skipped += counts.skipped
        self._steps += 1

    def close(self) -> dict[str, float]:
        """Metrics of the window, equal on all ranks (a collective, and the only wait for the device).

        train/loss is the mean over the window's label tokens of all ranks. perf/data_wait_frac is the mean over
        ranks, memory/max_reserved_gib the largest; so is perf/checkpoint_stall_seconds, which is there only where
        training stood still for a checkpoint since the window before.
        """
        host = [self._data_wait_seconds, memory_gib(self.device), self._checkpoint_stall_seconds]
        local = torch.cat([self._loss_sum[None], self._loss_sum.new_tensor(host)])
        ranks = local.new_empty(self.world_size * len(local))
        if is_distributed():
            dist.all_gather_into_tensor(ranks, local)
        else:
            ranks.copy_(local)
        ranks = ranks.view(self.world_size, len(local))
        rows = ranks.tolist()
        loss_sum, wait = (sum(row[i] for row in rows) for i in (0, 1))
        largest_memory, stall = (max(row[i] for row in rows) for i in (2, 3))
        seconds = max(time.perf_counter() - self._since - self._paused_seconds, 1e-9)
        per_gpu = 1.0 / (seconds * self.world_size)
        metrics = {
            "train/loss": loss_sum / max(1, self._label_tokens),
            "perf/samples_per_s_per_gpu": self._samples * per_gpu,
            "perf/images_per_s_per_gpu": self._images * per_gpu,
            "perf/tokens_per_s_per_gpu": self._tokens * per_gpu,
            "perf/data_wait_frac": min(1.0, wait * per_gpu),
            "perf/step_seconds": seconds / max(1, self._steps),
            "memory/max_reserved_gib": largest_memory,
            "data/skipped": float(self._skipped),
        }
        if stall > 0:
            metrics["perf/checkpoint_stall_seconds"] = stall
        self._begin()
        return metrics
