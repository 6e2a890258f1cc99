"""Kernels run in Triton's interpreter where there is no GPU; memory that nobody wrote is poison."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

# Read by Triton when a module with kernels is first imported, so before any of them. The accuracy tests mean the
# interpreter; what needs the compiler (test_aot.py) starts processes of its own.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        tensor = function(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

    return allocate


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (integers: the largest one), so that an output which a kernel forgot cannot pass."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))
    yield
