"""Bytes that are alive while a program runs, on real tensors or on fake ones (shapes and dtypes, no data).

Without the allocator's rounding and fragmentation, a library's workspaces and the CUDA context; what a compiler would
fuse is not known here.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still referred to.

    Args:
        given: tensors that were there before. Their storages do not count, whatever views are made of them: a linear
            layer makes one of its weight, which would count as long as the backward pass needs it.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._given = list(given)  # held, so that no address is used twice
        self._known = {tensor.untyped_storage()._cdata for tensor in self._given}

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


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages behind `tensors`, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
