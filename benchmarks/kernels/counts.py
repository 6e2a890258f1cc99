"""What can be counted without running anything: launches, operations, bytes, and what backward keeps.

Runs an implementation on fake tensors of the full shape (no data, no arithmetic) and watches what reaches PyTorch's
dispatcher. So a count is exact for the shape and says nothing about speed.

    launches   dispatched operations that are neither views nor allocations: each is a kernel or a few. A custom
               operation of ours counts as one. On CUDA the profiler counts the kernels themselves.
    flops      of matmuls and attention, from PyTorch's formulas; of our operation the algorithmic minimum
    traffic    bytes of every operation's inputs and outputs: what eager execution moves if nothing stays in cache
    saved      bytes that autograd keeps for the backward pass beside inputs and parameters, each storage once
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.kernels.cases import Case, Inputs, make_inputs, needing_gradients, output_gradients
from benchmarks.kernels.implementations import Outputs
from benchmarks.kernels.inputs import CrossInputs, build_tables
from benchmarks.kernels.registry import Implementation, Run

aten = torch.ops.aten
_NO_LAUNCH = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::detach", "aten::alias", "prim::device",
    "aten::sym_size", "aten::is_same_size",
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Of one forward, and one backward, pass."""

    launches_forward: int
    launches_backward: int
    flops_forward: float
    flops_backward: float
    traffic_forward: float
    traffic_backward: float
    saved: int
    attention: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Watch(TorchDispatchMode):
    """Adds up what is dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.flops, self.traffic = 0, 0.0, 0.0
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name in _NO_LAUNCH or func.is_view or name.startswith("prim::"):
            return out
        self.launches += 1
        self.names[name] = self.names.get(name, 0) + 1
        packet = func._overloadpacket
        if name in FORMULAS:
            self.flops += FORMULAS[name](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        self.traffic += sum(_bytes(t) for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor))
        return out


@contextmanager
def watch_saved(given: Inputs) -> Iterator[Callable[[], int]]:
    """Bytes saved for backward inside, each storage once, without those of the inputs and the model."""
    known = {t.untyped_storage()._cdata for t in _given_tensors(given)}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for size, _ in kept.values())


def count(case: Case, implementation: Implementation, *, dtype: torch.dtype = torch.bfloat16) -> Counts:
    """Count one forward and one backward pass on fake tensors of the case's shape.

    Compiled rows are counted as their uncompiled function: what a compiler would fuse is not known here.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = torch.device("cpu")
    tables = build_tables(case.shape, device)  # of real numbers
    run = dataclasses.replace(implementation, compiled=False).build(case.level)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = make_inputs(case, implementation, device=device, dtype=dtype, backend="triton", tables=tables)
        # Fake tensors choose as the CPU does: its flash attention saves what the GPU's saves.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return count_run(run, given)


def count_run(run: Run, given: Inputs) -> Counts:
    """Count a function on the inputs it is given, fake or real."""
    with watch_saved(given) as saved, Watch() as forward:
        outputs: Outputs = run(given)
    saved_bytes = saved()
    with_gradients = needing_gradients(outputs)
    gradients = output_gradients(with_gradients)
    with Watch() as backward:
        torch.autograd.backward(with_gradients, gradients)
    return Counts(
        launches_forward=forward.launches,
        launches_backward=backward.launches,
        flops_forward=forward.flops,
        flops_backward=backward.flops,
        traffic_forward=forward.traffic,
        traffic_backward=backward.traffic,
        saved=saved_bytes,
        attention=attention_of(forward.names),
    )


def attention_of(names: Mapping[str, int]) -> tuple[str, ...]:
    """The attention kernels among dispatched operations: which backend SDPA really took."""
    return tuple(sorted(name.split("::")[1] for name in names if "attention" in name))


def _bytes(tensor: Tensor) -> int:
    """Of a view what it shows, of an expanded tensor what exists."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _given_tensors(given: Inputs) -> Iterator[Tensor]:
    if isinstance(given, CrossInputs):
        yield from (t for t in vars(given).values() if isinstance(t, Tensor))
    else:
        yield from given.model.parameters()
        yield from (given.features, given.query_tokens, given.input_ids, given.attention_mask)
    yield from (t for t in vars(given.groups).values() if isinstance(t, Tensor))


def _ours_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> float:
    rows, queries, heads, head_dim = query.shape
    return 4.0 * rows * queries * key.shape[1] * heads * head_dim


def _ours_backward_flops(
    gradient: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any
) -> float:
    return 2.5 * _ours_flops(query, key)


def _patch_logits_flops(features: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * features.numel()


def _sdpa_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _sdpa_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    return float(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


FORMULAS: dict[str, Callable[..., float]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _sdpa_flops,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward_flops,
    "samtrain_kernels::context_attention": _ours_flops,
    "samtrain_kernels::context_attention_backward": _ours_backward_flops,
    "samtrain_kernels::patch_logits": _patch_logits_flops,
    "samtrain_kernels::patch_logits_backward": _patch_logits_flops,
}
"""Operations that PyTorch's table lacks, by name."""
