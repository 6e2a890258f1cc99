"""One table of the benchmark, and the inputs of its rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import inputs as cross
from benchmarks.kernels import streams
from benchmarks.kernels.implementations import Outputs
from benchmarks.kernels.inputs import CrossInputs, OursBackend, Tables
from benchmarks.kernels.registry import Implementation, Structure
from benchmarks.kernels.shapes import Context, Level, Shape
from benchmarks.kernels.streams import QformerInputs

Inputs = CrossInputs | QformerInputs


@dataclass(frozen=True)
class Case:
    """What a table is about. logit_sd: standard deviation of attention and patch logits."""

    level: Level
    shape: Shape
    context: Context
    trained: bool
    structure: Structure = "found"
    logit_sd: float = 1.0

    @property
    def key(self) -> tuple[Any, ...]:
        """Names the table in files."""
        return (self.level, self.shape.name, self.context, self.trained, self.structure, self.logit_sd)


def make_inputs(
    case: Case,
    implementation: Implementation,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: OursBackend,
    seed: int = 0,
    chained: bool = False,
    computed_in: torch.dtype | None = None,
    like: Inputs | None = None,
    tables: Tables | None = None,
) -> Inputs:
    """Inputs of a row: the same values for every implementation.

    Args:
        dtype: what the values are rounded to. computed_in: what they are then widened to (float64: the oracle).
        chained: gradients end at the first leaves (see `inputs.derive`).
        like: earlier inputs of the row, whose model is used again.
        tables: index tables of the shape, where they cannot be built here (under fake tensors).
    """
    wider = computed_in or (torch.float32 if implementation.weights_float32 else None)
    if case.level == "qformer":
        return streams.draw_qformer(
            case.shape,
            case.context,
            trained=case.trained,
            device=device,
            dtype=dtype,
            backend=backend,
            seed=seed,
            logit_sd=case.logit_sd,
            attention=implementation.attention,
            model=like.model if isinstance(like, QformerInputs) else None,
            tables=tables,
            weights_in=wider,
            features_in=computed_in,
        )
    plain = cross.draw_cross(
        case.shape,
        case.context,
        trained=case.trained,
        device=device,
        dtype=dtype,
        backend=backend,
        seed=seed,
        logit_sd=case.logit_sd,
        tables=tables,
    )
    if wider is not None:
        plain = cross.in_precision(plain, wider, weights_only=computed_in is None)
    return cross.derive(plain, chained=chained)


def output_gradients(outputs: Outputs, *, seed: int = 7, sliced: bool = False) -> list[Tensor]:
    """Random gradients for the outputs that need one.

    sliced: views into a wider tensor, as the backward pass of a concatenation hands out: kernels that assume contiguity
    give wrong gradients on them.
    """
    gradients = []
    for output in outputs:
        generator = torch.Generator(output.device).manual_seed(seed)
        drawn = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
        if sliced:
            drawn = torch.cat([drawn, drawn, drawn], dim=1)[:, output.shape[1] : 2 * output.shape[1]]
        gradients.append(drawn)
    return gradients


def needing_gradients(outputs: Outputs) -> tuple[Tensor, ...]:
    """Frozen, the Q stream of a single layer has no backward pass."""
    return tuple(output for output in outputs if output.requires_grad)
