"""What a step of a real shape takes, counted without a GPU: the loops run on fake tensors (no data, no arithmetic).

    executed   floating-point operations of matmuls and attention, padding and recomputation included
    launches   dispatched operations that are no views
    peak       bytes alive at once: weights, gradients, optimizer, activations, transients; without the allocator's
               rounding and fragmentation, a library's workspaces and the CUDA context. What a compiler would fuse is
               not known here.

What the numbers of a batch decide (which labels count, how long rows are) is read from the real batch.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels.counts import Watch
from benchmarks.train.loops import Loop, Row, Setting, make_ours
from benchmarks.train.samples import StepData
from samtrain.model.live_bytes import LiveBytes, make_fake, storage_bytes


@dataclass(frozen=True)
class StepCounts:
    """Of one step; bytes. peak_phase: "activations" where forward and backward hold most, or "update"."""

    executed_flops: float
    launches: int
    weights: int
    optimizer: int
    peak: int
    peak_phase: str
    num_padded_tokens: int
    num_micro_batches: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_step(row: Row, setting: Setting, data: StepData) -> StepCounts:
    """Count one step of a row: every micro-batch, and the update."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Modules are made without memory first: PEFT moves its layers about, which fake parameters refuse.
    empty = replace(setting, made_on=torch.device("meta"))
    like = None
    if row.name not in ("ours", "ours_zero"):
        like = make_ours(empty, data, None).module
    loop = row.make(empty, data, like)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        make_fake(loop.module, setting.device)
        loop.activate()
    weights = storage_bytes(loop.module.parameters())
    optimizer = loop.engine.optimizer.num_bytes()
    watch, live = Watch(), LiveBytes(given=[*loop.module.parameters(), *loop.module.buffers()])
    peak = 0
    # Fake tensors choose as the CPU does: its flash attention saves what the GPU's saves.
    kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    with _labels_known(loop, mode), mode, kernels, watch, live:
        for batch in loop.batches:
            (loop.loss_sum(_fake(batch, mode)) / loop.num_labels).backward()
            peak = max(peak, live.peak)
    # The update: gradients in float32 of one piece at a time, beside those that are there.
    gradients = storage_bytes(p.grad for p in loop.module.parameters() if p.grad is not None)
    widened = max((sum(4 * p.numel() for p in piece[0]) for piece in loop.engine.optimizer.pieces), default=0)
    during_update = gradients + widened
    return StepCounts(
        executed_flops=watch.flops,
        launches=watch.launches,
        weights=weights,
        optimizer=optimizer,
        peak=weights + optimizer + max(peak, during_update),
        peak_phase="update" if during_update > peak else "activations",
        num_padded_tokens=loop.num_padded_tokens,
        num_micro_batches=len(loop.batches),
    )


def _fake(batch: Any, mode: FakeTensorMode) -> Any:
    if isinstance(batch, dict):
        return {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch._map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x)


@contextlib.contextmanager
def _labels_known(loop: Loop, mode: FakeTensorMode) -> Iterator[None]:
    """Which columns carry labels, found in the real labels: fake tensors have no values to look at."""
    from samtrain.model import modeling

    original = modeling.label_targets
    rows = [batch["labels"] if isinstance(batch, dict) else batch.labels[None] for batch in loop.batches]
    found = iter([original(labels) for labels in rows])

    def known(labels: Tensor, num_label_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        columns, targets = next(found)
        return mode.from_tensor(columns), mode.from_tensor(targets)

    modeling.label_targets = known
    try:
        yield
    finally:
        modeling.label_targets = original
