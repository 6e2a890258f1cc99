"""Kernels run in Triton's interpreter where there is no GPU; memory that nobody wrote is poison."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
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


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device functions of a kernel run without replacing all of triton.language again at each call, which the launch of
    the kernel has done: a third of the time of kernels that call many."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patched = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_triton = self.fn.__module__.startswith("triton.")
        return patched(self, *args, **kwargs) if is_triton else self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture
def mutant(tmp_path: Path) -> Callable[..., ModuleType]:
    """A copy of a module with one piece of its text replaced: a planted bug that a test must see."""

    def plant(module: ModuleType, original: str, planted: str) -> ModuleType:
        assert module.__file__ is not None
        text = Path(module.__file__).read_text()
        assert text.count(original) == 1, f"{original!r} occurs {text.count(original)} times in {module.__file__}"
        path = tmp_path / f"planted_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text.replace(original, planted))  # a file: Triton reads a kernel's source from it
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return plant
