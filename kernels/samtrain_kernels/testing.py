"""How close is close enough: the float64 oracle and the tolerance rule of tests and benchmarks.

An operation is judged twice, always against float64 on the same (already rounded) inputs:

1. Relative to plain PyTorch in the same precision: the largest error may be at most 2 times (gradients: 3 times) that
   of the reference, plus 1e-5 of the largest value. So a kernel cannot be worse than the eager code it replaces.
2. Absolute: the root mean square error, relative to that of the exact values, stays below a ceiling for the
   precision. So a bad reference cannot hide a bug.

What must be zero is compared with zero. NaN and Inf never pass.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["output", "gradient", "mix_gradient"]
"""`gradient`: of queries, keys, values, features. `mix_gradient`: of mixing weights, score weight and biases, which sum
over far more terms."""

EAGER_FACTOR: Mapping[Kind, float] = {"output": 2.0, "gradient": 3.0, "mix_gradient": 3.0}
EAGER_SLACK = 1e-5

CEILING: Mapping[torch.dtype, Mapping[Kind, float]] = {
    torch.bfloat16: {"output": 4e-3, "gradient": 8e-3, "mix_gradient": 1e-2},
    torch.float16: {"output": 1e-3, "gradient": 2e-3, "mix_gradient": 2.5e-3},
    torch.float32: {"output": 5e-6, "gradient": 5e-6, "mix_gradient": 5e-6},
    torch.float64: {"output": 1e-13, "gradient": 1e-12, "mix_gradient": 1e-12},
}


def evaluate(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor | None],
    output_gradient: Tensor | None = None,
    *,
    wrt: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run a function on copies of its inputs and, where asked, backwards.

    Args:
        inputs: keyword arguments that are tensors (or None). Strides are kept where `dtype` is None.
        output_gradient: what flows back; needed for `wrt`.
        wrt: names of the inputs whose gradients are wanted.
        dtype: run in this precision instead (float64: the oracle).

    Returns:
        {"output": ..., name: gradient with respect to that input, ...}; zeros where autograd returns no gradient.
    """
    copies: dict[str, Tensor | None] = {}
    for name, value in inputs.items():
        if value is not None:
            value = value.detach() if dtype is None or not value.is_floating_point() else value.detach().to(dtype)
            value.requires_grad_(name in wrt)
        copies[name] = value
    output = function(**copies)
    results = {"output": output.detach()}
    if wrt:
        assert output_gradient is not None, "wrt needs an output_gradient"
        asked = [value for name in wrt if (value := copies[name]) is not None]
        gradients = torch.autograd.grad(output, asked, output_gradient.to(output.dtype), materialize_grads=True)
        results |= dict(zip(wrt, gradients, strict=True))
    return results


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute error, relative to the largest exact value."""
    return ((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()


def rms_error(got: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    return ((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-300)).item()


def disagreement(got: Tensor, eager: Tensor, exact: Tensor, *, kind: Kind, dtype: torch.dtype) -> str | None:
    """Why `got` is not accurate enough, with the figures, or None where it is.

    Args:
        got: of the operation under test. eager: of the reference in the same precision. exact: float64.
        dtype: precision of the inputs; its ceiling applies whatever the dtype of `got` is.
    """
    if got.shape != exact.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not torch.isfinite(got).all():
        return f"{int((~torch.isfinite(got)).sum())} of {got.numel()} values are NaN or Inf"
    if got.numel() == 0:
        return None
    if not exact.any():
        return None if not got.any() else f"must be exactly zero, largest value {got.abs().max().item():.3g}"
    error, eager_error = largest_error(got, exact), largest_error(eager, exact)
    allowed = EAGER_FACTOR[kind] * eager_error + EAGER_SLACK
    if error > allowed:
        return f"largest error {error:.3g} > {allowed:.3g} = {EAGER_FACTOR[kind]:g} x eager's {eager_error:.3g} + 1e-5"
    rms, ceiling = rms_error(got, exact), CEILING[dtype][kind]
    return f"RMS error {rms:.3g} > ceiling {ceiling:.3g} of {dtype}" if rms > ceiling else None


def assert_accurate(
    got: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    kinds: Mapping[str, Kind],
) -> None:
    """Apply the rule to every result of `evaluate`; `kinds` says what each name is ("output" needs no entry).

    Raises:
        AssertionError: naming every result that is not accurate enough, with its figures.
    """
    known: dict[str, Kind] = {"output": "output", **kinds}
    wrong = {
        name: why
        for name in exact
        if (why := disagreement(got[name], eager[name], exact[name], kind=known[name], dtype=dtype)) is not None
    }
    assert not wrong, "; ".join(f"{name}: {why}" for name, why in wrong.items())


def in_compiler(program: str, *, folder: Path) -> Any:
    """What a Python program prints last, as JSON, run in `folder` where Triton compiles: here it may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
