"""Correct first: what every row has to pass before any time of it is printed.

1. A sub-batch of two samples against float64 on the same, already rounded, inputs: outputs and gradients, the gradient
   of the output a strided slice. The rule is samtrain_kernels.testing's: relative to eager PyTorch in the same
   precision (for our rows), and an absolute ceiling (for all).
2. The full shape against the eager row in the same precision, within twice the ceiling.

Gradients end at the same leaves for all rows: queries, the score weight of the adaptive adjustment and, trained, the
key/value projection. (The key's bias is left out: its gradient is zero, and what is computed is rounding noise.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from samtrain_kernels.testing import CEILING, EAGER_FACTOR, EAGER_SLACK, Kind, largest_error, rms_error
from torch import Tensor

from benchmarks.kernels.cases import Case, Inputs, make_inputs, needing_gradients, output_gradients
from benchmarks.kernels.inputs import CrossInputs, OursBackend
from benchmarks.kernels.registry import Implementation, Run, reference_of

# Twelve layers of rounding, in units of the ceiling of one operation. Eager bfloat16 outputs are at 2 on real sizes.
DEPTH_FACTOR = {"mix": 1.0, "op": 1.0, "cross": 1.0, "qformer": 4.0}

KINDS: dict[str, Kind] = {
    "query": "gradient",
    "context_query": "gradient",
    "kv_weight": "gradient",
    "value_bias": "mix_gradient",
    "score_weight": "mix_gradient",
}


@dataclass(frozen=True)
class Verdict:
    """match: ok, or FAIL. why: what failed first. errors: RMS error of each result, relative to the exact values."""

    match: str
    why: str
    errors: Mapping[str, float]

    @property
    def is_ok(self) -> bool:
        return self.match == "ok"


class Gate:
    """The float64 and eager results of one table, and the judgement of its rows."""

    def __init__(self, case: Case, *, device: torch.device, dtype: torch.dtype, backend: OursBackend) -> None:
        self.case, self.device, self.dtype, self.backend = case, device, dtype, backend
        self.small = replace(case, shape=sub_batch(case))
        eager = reference_of(case.level)
        self.exact = self._evaluate(eager, eager.build(case.level), self.small, computed_in=torch.float64)
        self.eager = self._evaluate(eager, eager.build(case.level), self.small)
        self.full: dict[str, Tensor] | None = None

    def judge(self, implementation: Implementation, run: Run, *, full: bool, backward: bool = True) -> Verdict:
        """Both checks; `full=False`: the first alone. `backward=False`: outputs alone."""
        got = self._evaluate(implementation, run, self.small, backward=backward)
        errors = {name: rms_error(value, self.exact[name]) for name, value in got.items()}
        for name, value in got.items():
            is_ours = implementation.family == "ours"
            if why := self.disagreement(name, value, self.eager[name] if is_ours else None, self.exact[name]):
                return Verdict("FAIL", f"{name}: {why}", errors)
        if full:
            if self.full is None:
                eager = reference_of(self.case.level)
                self.full = self._evaluate(eager, eager.build(self.case.level), self.case, sliced=False)
            got = self._evaluate(implementation, run, self.case, sliced=False, backward=backward)
            for name, value in got.items():
                error, allowed = rms_error(value, self.full[name].double()), 2 * self.ceiling(name)
                if not error <= allowed:
                    return Verdict("FAIL", f"full shape, {name}: RMS {error:.2g} from eager > {allowed:.2g}", errors)
        return Verdict("ok", "", errors)

    def ceiling(self, name: str) -> float:
        """Grows with the logits: the rounding of a key moves a logit in proportion to its size."""
        return CEILING[self.dtype][_kind(name)] * DEPTH_FACTOR[self.case.level] * max(1.0, self.case.logit_sd)

    def disagreement(self, name: str, got: Tensor, eager: Tensor | None, exact: Tensor) -> str | None:
        """Why a result is not accurate enough, or None where it is; compared with `eager` where that is given."""
        if got.shape != exact.shape:
            return f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
        if not torch.isfinite(got).all():
            return f"{int((~torch.isfinite(got)).sum())} of {got.numel()} values are NaN or Inf"
        if not exact.any():
            return None if not got.any() else f"must be exactly zero, largest value {got.abs().max().item():.3g}"
        if eager is not None:
            factor = EAGER_FACTOR[_kind(name)]
            error, allowed = largest_error(got, exact), factor * largest_error(eager, exact) + EAGER_SLACK
            if error > allowed:
                return f"largest error {error:.2g} > {allowed:.2g}, {factor:g} x eager's"
        rms, ceiling = rms_error(got, exact), self.ceiling(name)
        return f"RMS error {rms:.2g} > ceiling {ceiling:.2g}" if rms > ceiling else None

    def _evaluate(
        self,
        implementation: Implementation,
        run: Run,
        case: Case,
        *,
        computed_in: torch.dtype | None = None,
        sliced: bool = True,
        backward: bool = True,
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        inputs = make_inputs(
            case, implementation, device=self.device, dtype=self.dtype, backend=self.backend, chained=True,
            computed_in=computed_in,
        )  # fmt: skip
        if not backward:
            with torch.no_grad():
                return _outputs(run(_without_gradients(inputs)))
        outputs = run(inputs)
        results = _outputs(outputs)
        leaves = _named_leaves(inputs)
        with_gradients = needing_gradients(outputs)
        # Rounded to the run's precision before they are widened, as the inputs are.
        drawn = [
            g.to(self.dtype).to(o.dtype)
            for g, o in zip(output_gradients(with_gradients, sliced=sliced), with_gradients)
        ]
        gradients = torch.autograd.grad(
            with_gradients, list(leaves.values()), drawn, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(leaves, gradients):
            if name == "kv_bias":
                name, gradient = "value_bias", gradient.chunk(2)[1]
            results[name] = gradient
        return results


def sub_batch(case: Case) -> Any:
    """Two samples of the shape, of different sizes where it has them."""
    sizes = sorted(set(case.shape.counts))
    counts = (sizes[0], sizes[-1]) if len(sizes) > 1 else case.shape.counts[:2]
    return replace(case.shape, counts=counts)


def _without_gradients(inputs: Inputs) -> Inputs:
    """Some functions refuse a tensor that needs a gradient even where none is recorded."""
    if not isinstance(inputs, CrossInputs):
        inputs.model.requires_grad_(False)
        return replace(inputs, query_tokens=inputs.query_tokens.detach())
    tensors: Any = {name: value.detach() for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    return replace(inputs, **tensors)


def _outputs(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"output {i}": output.detach() for i, output in enumerate(outputs)}


def _named_leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Where gradients end. Of the whole Q-Former: guidance and, trained, some layers' weights."""
    if isinstance(inputs, CrossInputs):
        names = ["score_weight", "context_query"] + ["query", "kv_weight", "kv_bias"] * inputs.trained
        return {name: getattr(inputs, name) for name in names}
    named: dict[str, Tensor] = {
        f"guidance {n}": p for n, p in inputs.guidance.named_parameters() if n.endswith("weight")
    }
    if inputs.trained:
        layers: Any = inputs.qformer.encoder.layer
        named["query_tokens"] = inputs.query_tokens
        for t in (0, len(layers) - 1):
            named[f"layer {t + 1} self-attention value"] = layers[t].attention.attention.value.weight
        named["layer 1 cross-attention value"] = layers[0].crossattention.attention.value.weight
    return named


def _kind(name: str) -> Kind:
    if name.startswith("output"):
        return "output"
    return KINDS.get(name, "mix_gradient" if "patch_score" in name else "gradient")
