"""Every implementation of every level: a plain dictionary.

A row of a table is (implementation, level). `library` rows are what "vs best library" compares with; `loop` rows are
the authors' way of writing it; `ours` rows are this project's.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.kernels import implementations as cross
from benchmarks.kernels import streams
from benchmarks.kernels.implementations import Outputs
from benchmarks.kernels.shapes import CONTEXTS, Context, Level

Run = Callable[[Any], Outputs]
"""Inputs of the level -> its outputs."""

Family = Literal["loop", "library", "ours"]
Structure = Literal["found", "shared"]
"""Level qformer has two tables. found: the library as one would batch it; shared: with ours' structure (one W row per
sample, no graph where nothing trains), so that gains of kernels and of structure are never mixed."""


@dataclass(frozen=True)
class Implementation:
    """A way to compute levels.

    compiled: run under torch.compile. same_as: the row without. weights_float32: a float32 model under autocast.
    requires: a package that may be absent. attention: `_attn_implementation` of the Q-Former's own layers.
    without_backward_on_cpu: PyTorch has no backward pass for it there. contexts: those it can read. forward_only: a
    candidate without a backward pass, and without a table of a machine that has no GPU.
    """

    label: str
    family: Family
    levels: Mapping[Level, Run]
    structure: Structure = "found"
    compiled: bool = False
    weights_float32: bool = False
    requires: str | None = None
    attention: str = "sdpa"
    same_as: str | None = None
    without_backward_on_cpu: bool = False
    contexts: tuple[Context, ...] = CONTEXTS
    forward_only: bool = False

    @property
    def is_absent(self) -> bool:
        return self.requires is not None and importlib.util.find_spec(self.requires) is None

    def build(self, level: Level, *, compile_backend: str = "inductor") -> Run:
        """The function to time; compiled once here, for all input sets of a table."""
        run = self.levels[level]
        if self.weights_float32:
            return functools.partial(_under_autocast, run)
        if not self.compiled:
            return run
        # The whole Q-Former may break its graph inside transformers; an operation may not.
        return torch.compile(run, fullgraph=level != "qformer", dynamic=False, backend=compile_backend)


def _under_autocast(run: Run, inputs: Any) -> Outputs:
    dtype = inputs.features.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return run(inputs)
    with torch.autocast(inputs.features.device.type, dtype):
        return run(inputs)


def _materialised(attention: cross.Attention, qformer: Run) -> dict[Level, Run]:
    return {
        "op": functools.partial(cross.op_materialised, attention=attention),
        "cross": functools.partial(cross.cross_materialised, attention=attention),
        "qformer": qformer,
    }


def _mixed(mix: cross.Mix, qformer: Run) -> dict[Level, Run]:
    return {
        "op": functools.partial(cross.op_mixed, mix=mix),
        "cross": functools.partial(cross.cross_mixed, mix=mix),
        "qformer": qformer,
    }


def _plain(make_reader: Any) -> Run:
    return functools.partial(streams.plain, make_reader=make_reader)


def _shared(make_reader: Any) -> Run:
    return functools.partial(streams.shared, make_reader=make_reader)


_MIXED = streams.library_reader(is_mixed=True)
_FLEX = streams.library_reader(attention=cross.flex)
_FLASH = streams.library_reader(attention=cross.flash_varlen)
_LAYERS = streams.materialised_reader  # transformers' layers as they are

_MIX_LINEAR: dict[Level, Run] = {"mix": cross.mix_linear}
_MIX_WIDE: dict[Level, Run] = {"mix": cross.mix_eager}
_LOOP: dict[Level, Run] = {"op": cross.op_loop, "cross": cross.cross_loop, "qformer": streams.loop}
_EAGER_FOUND = _materialised(cross.eager_attention, _plain(_LAYERS))
_SDPA_FOUND = _materialised(cross.sdpa, _plain(_LAYERS))
_FLEX_FOUND = _materialised(cross.flex, _plain(_FLEX))
_FLASH_FOUND = _materialised(cross.flash_varlen, _plain(_FLASH))
_MIXED_FOUND = _mixed(cross.mix_by_einsum, _plain(_MIXED))
_MIXED_FUSED = _mixed(cross.mix_by_sum, _plain(_MIXED))
_EAGER_SHARED: dict[Level, Run] = {"qformer": _shared(_LAYERS)}
_SDPA_SHARED: dict[Level, Run] = {"qformer": streams.ours_materialised}
_FLEX_SHARED: dict[Level, Run] = {"qformer": _shared(_FLEX)}
_FLASH_SHARED: dict[Level, Run] = {"qformer": _shared(_FLASH)}
_MIXED_SHARED: dict[Level, Run] = {"qformer": _shared(_MIXED)}
_OURS: dict[Level, Run] = {
    "mix": cross.mix_ours,
    "op": cross.op_ours,
    "cross": cross.cross_ours,
    "qformer": streams.ours,
}

# Of the tiles that compile without a spill for both chips; no tuner has seen them (benchmarks/results/dual-aot.txt).
_DUAL_TILES = {"dual": (2, 64, 8, 2), "dual_short_tiles": (2, 32, 8, 2), "dual_single": (1, 64, 4, 2)}

_library = functools.partial(Implementation, family="library")
_compiled = functools.partial(Implementation, family="library", compiled=True)

IMPLEMENTATIONS: dict[str, Implementation] = {
    "mix_linear": _library("Linear in the features' dtype", levels=_MIX_LINEAR),
    "mix_linear_compiled": _compiled("the same, compiled", levels=_MIX_LINEAR, same_as="mix_linear"),
    "mix_wide": _library("logits in float32", levels=_MIX_WIDE),
    "mix_wide_compiled": _compiled("the same, compiled", levels=_MIX_WIDE, same_as="mix_wide"),
    "loop_autocast": Implementation(
        "loop, fp32 weights + autocast", "loop", _LOOP, weights_float32=True, attention="eager"
    ),
    "loop": Implementation("loop, bf16 weights", "loop", _LOOP, attention="eager"),
    "eager": _library("batched, eager attention", levels=_EAGER_FOUND, attention="eager"),
    "sdpa": _library("SDPA, materialised", levels=_SDPA_FOUND),
    "sdpa_compiled": _compiled("SDPA, materialised, compiled", levels=_SDPA_FOUND, same_as="sdpa"),
    "mixed": _library("mixed K/V + SDPA", levels=_MIXED_FOUND),
    "mixed_compiled": _compiled("mixed K/V + SDPA, compiled", levels=_MIXED_FUSED, same_as="mixed"),
    "flex": _compiled(
        "FlexAttention, materialised, compiled", levels=_FLEX_FOUND, same_as="sdpa", without_backward_on_cpu=True
    ),
    "flash": _library("flash-attn varlen, materialised", levels=_FLASH_FOUND, requires="flash_attn"),
    "eager_shared": _library("batched, eager attention", levels=_EAGER_SHARED, structure="shared", attention="eager"),
    "sdpa_shared": _library("SDPA, materialised", levels=_SDPA_SHARED, structure="shared"),
    "sdpa_shared_compiled": _compiled(
        "SDPA, materialised, compiled", levels=_SDPA_SHARED, structure="shared", same_as="sdpa_shared"
    ),
    "mixed_shared": _library("mixed K/V + SDPA", levels=_MIXED_SHARED, structure="shared"),
    "mixed_shared_compiled": _compiled(
        "mixed K/V + SDPA, compiled", levels=_MIXED_SHARED, structure="shared", same_as="mixed_shared"
    ),
    "flex_shared": _compiled(
        "FlexAttention, materialised, compiled",
        levels=_FLEX_SHARED,
        structure="shared",
        same_as="sdpa_shared",
        without_backward_on_cpu=True,
    ),
    "flash_shared": _library(
        "flash-attn varlen, materialised", levels=_FLASH_SHARED, structure="shared", requires="flash_attn"
    ),
    "ours": Implementation("ours", "ours", _OURS),
    "ours_compiled": Implementation("ours, compiled", "ours", _OURS, compiled=True, same_as="ours"),
    "ours_unshared": Implementation("ours without the shared W stream", "ours", {"qformer": streams.ours_unshared}),
    **{
        name: Implementation(
            f"ours, both streams in one launch {'/'.join(map(str, tiles))}",
            "ours",
            {"cross": functools.partial(cross.cross_dual, tiles=tiles)},
            contexts=("others",),
            forward_only=True,
        )
        for name, tiles in _DUAL_TILES.items()
    },
}

IN_BOTH_TABLES = ("ours", "ours_compiled")


def reference_of(level: Level) -> Implementation:
    """The plainest row of a level; in float64 it is the truth, in the run's precision what others are compared with."""
    return IMPLEMENTATIONS["mix_wide" if level == "mix" else "eager"]


def rows_of(
    level: Level, structure: Structure = "found", *, context: Context | None = None, only: tuple[str, ...] = ()
) -> dict[str, Implementation]:
    """The implementations of one table, in order; with `context`, those that can read it.

    Raises:
        ValueError: `only` names something that is not there.
    """
    if unknown := [name for name in only if name not in IMPLEMENTATIONS]:
        raise ValueError(f"no implementation {', '.join(unknown)}; choose from {', '.join(IMPLEMENTATIONS)}")
    return {
        name: implementation
        for name, implementation in IMPLEMENTATIONS.items()
        if level in implementation.levels
        and (context is None or context in implementation.contexts)
        and (implementation.structure == structure or name in IN_BOTH_TABLES)
        and (not only or name in only)
    }
