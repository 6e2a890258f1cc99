"""Planted bugs: each is one line of the kernels of context attention, and each must be seen by the accuracy rule."""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from samtrain_kernels.context_attention.reference import AttentionInputs, context_attention_reference
from samtrain_kernels.settings import KernelSetting
from samtrain_kernels.testing import disagreement, evaluate
from torch import Tensor

from samtrain.core.batch import ImageGroups

pytestmark = pytest.mark.usefixtures("quick_interpreter")
kernels: ModuleType = pytest.importorskip("samtrain_kernels.context_attention.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value", "weights", "key_bias", "value_bias")
COUNTS = [2, 3]
SETTING = KernelSetting(images_per_block=2, block_patches=32, num_warps=4, num_stages=2)
KV_SETTING = KernelSetting(images_per_block=1, block_patches=32, num_warps=4, num_stages=2)

BUGS = {
    "ragged patches dropped": (
        "if RAGGED_W > 0:\n        first_patches = tl.arange(0, RAGGED_W)\n        acc",
        "if RAGGED_W > 99:\n        first_patches = tl.arange(0, RAGGED_W)\n        acc",
    ),
    "ragged patches dropped backwards": (
        "if RAGGED_W > 0:\n        first_patches = tl.arange(0, RAGGED_W)\n        dq",
        "if RAGGED_W > 99:\n        first_patches = tl.arange(0, RAGGED_W)\n        dq",
    ),
    "weights missing in the scores": ("_mix(a, _products(q, k, key, image,", "(0.5 * _products(q, k, key, image,"),
    "weights missing in the output": ("_mix(a, p)", "p"),
    "output not rescaled": ("acc = acc * shrink[:, None]", "acc = acc * 1.0"),
    "sum not rescaled": ("total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    "patches that do not exist attended to": (
        'scores = tl.where(inside[None, :], scores, float("-inf"))',
        "scores = scores * 1.0",
    ),
    "natural logarithm in lse": ("peak + tl.log2(total)", "peak + tl.log(total)"),
    "delta forgotten": ("dp - delta[:, None]", "dp"),
    "scale forgotten": ("(dp - delta[:, None]) * scale", "(dp - delta[:, None])"),
    "own image read": ("mask = (unread_slots != slot)[:, None]", "mask = (unread_slots >= -1)[:, None]"),
    "first query set for all": ("tl.where(live, sets, 0), live", "sets * 0, live"),
    "last image skipped": ("num_read = num_images\n", "num_read = num_images - 1\n"),
    "first image's bias for all": ("bias + image * stride_bias", "bias + 0 * stride_bias"),
    "gradient of the weights without its value part": ("dots = ds * _products(", "dots = 0 * ds * _products("),
    "slots of smaller samples left unwritten": ("range(num_images, num_slots)", "range(num_slots, num_slots)"),
    "own context in the gradient of keys": ("skipped = slot\n", "skipped = num_read + slot * 0\n"),
    "weights missing in the gradient of keys": (
        "tl.trans(ds).to(tl.float32) * a[:, None]",
        "tl.trans(ds).to(tl.float32)",
    ),
    "scratch columns shifted": ('"first_column": scratch.first_column', '"first_column": scratch.first_column + 1'),
}


@cache
def problem() -> tuple[AttentionInputs, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Inputs with 33 patches (a ragged tile and a full one), an output gradient, and the results of the reference in
    float32 and float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    images, slots = sum(COUNTS), max(COUNTS)
    inputs = {
        "query": normal(images, 8, 1, 16), "key": normal(images, 33, 1, 16), "value": normal(images, 33, 1, 16),
        "weights": normal(images, slots, 33).softmax(1), "key_bias": normal(images, 1, 16),
        "value_bias": normal(images, 1, 16),
    }  # fmt: skip
    groups: Any = ImageGroups.from_counts(COUNTS).to(DEVICE)

    def reference(**tensors: Tensor) -> Tensor:
        x = AttentionInputs(**tensors, groups=groups, context="others", queries="image", scale=0.3)
        return context_attention_reference(x)[0]

    gradient = normal(images, 8, 1, 16)
    eager = evaluate(reference, inputs, gradient, wrt=NAMES)
    exact = evaluate(reference, inputs, gradient, wrt=NAMES, dtype=torch.float64)
    plain: Any = inputs
    x = AttentionInputs(**plain, groups=groups, context="others", queries="image", scale=0.3)
    return x, gradient, eager, exact


def wrong_results(module: ModuleType) -> dict[str, str]:
    """What of the output and the gradients the accuracy rule refuses, and why."""
    x, gradient, eager, exact = problem()
    output, lse = module.forward(x, setting=SETTING)
    gradients = module.backward(x, gradient, output, lse, [True] * 6, setting=SETTING, kv_setting=KV_SETTING)
    got = {"output": output, **dict(zip(NAMES, gradients, strict=True))}
    found = {
        name: disagreement(got[name], eager[name], exact[name], kind="gradient", dtype=torch.float32) for name in got
    }
    return {name: why for name, why in found.items() if why is not None}


@pytest.mark.usefixtures("poison")
def test_the_kernels_as_they_are_pass() -> None:
    assert wrong_results(kernels) == {}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug: str, mutant: Callable[..., ModuleType]) -> None:
    problem()
    wrong = wrong_results(mutant(kernels, *BUGS[bug]))
    assert wrong, bug
