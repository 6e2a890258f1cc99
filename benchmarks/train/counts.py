"""What a step of a real shape takes, counted without a GPU: the loops run on fake tensors (no data, no arithmetic).

    executed   floating-point operations of matmuls and attention, padding and recomputation included
    launches   dispatched operations that are no views
    peak       bytes alive at once: weights, gradients, optimizer, activations, transients; without the allocator's
               rounding and fragmentation, a library's workspaces and the CUDA context. What a compiler would fuse is
               not known here.

What the numbers of a batch decide (which labels count, how long rows are) is read from the real batch.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.kernels.counts import Watch
from benchmarks.train.loops import Loop, Row, Setting, make_ours
from benchmarks.train.samples import StepData


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


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


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
    weights = _storage_bytes(loop.module.parameters())
    optimizer = loop.engine.optimizer.num_bytes()
    watch, live = Watch(), LiveBytes()
    peak = 0
    # Fake tensors choose as the CPU does: its flash attention saves what the GPU's saves.
    kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    with _labels_known(loop, mode), mode, kernels, watch, live:
        for batch in loop.batches:
            (loop.loss_sum(_fake(batch, mode)) / loop.num_labels).backward()
            peak = max(peak, live.peak)
    # The update: gradients in float32 of one piece at a time, beside those that are there.
    gradients = _storage_bytes(p.grad for p in loop.module.parameters() if p.grad is not None)
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


def make_fake(module: nn.Module, device: torch.device) -> None:
    """Fake tensors on `device` in place of all parameters and buffers, tied ones once."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for child in module.modules():
        members: list[dict[str, Any]] = [child._parameters, child._buffers]
        for tensors in members:
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = fake(tensor)


def _storage_bytes(tensors: Any) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


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
