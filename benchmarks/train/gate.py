"""Correct first: a row is timed only when loss and gradients of the whole step equal those of its yardstick.

`ours` is held to the reference-style loop, `ours, guidance off` to transformers' InstructBLIP: the same mathematics,
written by others. Dropout is off while rows are compared. Random weights give every label a loss of its own, so the
mean over a step's labels tells models apart; gradients are compared part by part, so that none hides behind another.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.train.loops import Loop, ZeroLoop
from samtrain.model.freezing import part_of

NO_GRADIENT = ("patch_score.bias",)  # exactly zero: a softmax does not see it


@dataclass(frozen=True)
class Tolerance:
    """loss: nats per label. cosine: least, of a part's gradients. norm: relative difference of their lengths."""

    loss: float
    cosine: float
    norm: float


# bfloat16 rounds every sum to 3 digits; tens of layers of other order leave gradients of some parts this far apart.
TOLERANCES = {torch.float32: Tolerance(1e-4, 0.9999, 1e-3), torch.bfloat16: Tolerance(0.02, 0.97, 0.05)}


@dataclass(frozen=True)
class Outcome:
    """loss: nats per label. gradients: of what trains, by name; empty where the engine keeps them to itself."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """match: "ok" or "FAIL". errors: what was compared, in numbers."""

    match: str
    why: str = ""
    errors: dict[str, float] = field(default_factory=dict)


def outcome_of(loop: Loop) -> Outcome:
    """One forward and backward pass of the step, dropout off; the loop is left as it was found."""
    loop.train(False)
    try:
        if isinstance(loop, ZeroLoop):
            loop.activate()
            loop.train(False)
            with torch.no_grad():
                total = sum(loop.engine.forward(loop.to_device(b)).loss_sum for b in loop.batches)
            return Outcome(float(total) / loop.num_labels, {})
        loss = float(loop.gradients()) / loop.num_labels
        gradients = {
            name: parameter.grad
            for name, parameter in loop.module.named_parameters()
            if parameter.grad is not None and not name.endswith(NO_GRADIENT)
        }
        return Outcome(loss, gradients)
    finally:
        for parameter in loop.module.parameters():
            parameter.grad = None
        loop.train(True)


def judge(found: Outcome, expected: Outcome, dtype: torch.dtype) -> Verdict:
    """Compare a row with its yardstick on the parameters that both train."""
    tolerance = TOLERANCES[dtype]
    errors = {"loss": abs(found.loss - expected.loss)}
    wrong = []
    if not errors["loss"] <= tolerance.loss:
        wrong.append(f"loss {found.loss:.5f}, expected {expected.loss:.5f}")
    for part, names in _by_part(found, expected).items():
        cosine, norm = _compare([found.gradients[name] for name in names], [expected.gradients[name] for name in names])
        errors[f"{part}: 1 - cosine"], errors[f"{part}: norm"] = 1 - cosine, norm
        if not (cosine >= tolerance.cosine and norm <= tolerance.norm):
            wrong.append(f"gradients of {part}: cosine {cosine:.5f}, lengths differ by {100 * norm:.2f} %")
    if found.gradients and not set(found.gradients) & set(expected.gradients):
        wrong.append("no parameter trains in both")
    return Verdict("FAIL" if wrong else "ok", "; ".join(wrong), errors)


def _by_part(found: Outcome, expected: Outcome) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in found.gradients:
        if name in expected.gradients:
            parts.setdefault(part_of(name), []).append(name)
    return parts


def _compare(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """Cosine, and relative difference of lengths, of two lists of tensors as one vector each."""
    dot = aa = bb = 0.0
    for x, y in zip(a, b):
        x, y = x.flatten().float(), y.flatten().float()
        dot, aa, bb = dot + float(x @ y), aa + float(x @ x), bb + float(y @ y)
    if aa == 0.0 or bb == 0.0:
        return (1.0, 0.0) if aa == bb else (0.0, 1.0)
    return dot / (aa * bb) ** 0.5, abs((aa / bb) ** 0.5 - 1)
