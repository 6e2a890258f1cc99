"""Image mixing against a loop over samples, images and patches."""

from typing import Any

import pytest
import torch
from samtrain_kernels import image_mix_weights, mix_images
from torch import Tensor

from samtrain.core.batch import ImageGroups


def by_loop(features: Tensor, weight: Tensor, logit_bias: Tensor, counts: list[int], context: str) -> Tensor:
    scores = features @ weight + logit_bias[:, None]
    mixed, start = [], 0
    for count in counts:
        own = list(range(start, start + count))
        for i in own if context == "others" else [None]:
            members = [j for j in own if j != i]
            c = features[0] * 0.0
            for p in range(features.shape[1]):
                if members:
                    a = torch.softmax(torch.stack([scores[j, p] for j in members]), 0)
                    c = c.index_put((torch.tensor(p),), sum(a[n] * features[j, p] for n, j in enumerate(members)))
            mixed.append(c)
        start += count
    return torch.stack(mixed)


def by_op(features: Tensor, weight: Tensor, logit_bias: Tensor, counts: list[int], context: Any) -> Tensor:
    groups = ImageGroups.from_counts(counts)
    weights = image_mix_weights(features, weight, None, groups, context=context, logit_bias=logit_bias)
    return mix_images(features, weights, groups, context=context)


@pytest.mark.parametrize("context", ["others", "all"])
@pytest.mark.parametrize("counts", [[1], [2], [5], [2, 1, 3], [0, 2, 0, 4]])
@pytest.mark.parametrize("patches", [1, 7])
def test_mix_and_gradients_equal_the_loop(context: str, counts: list[int], patches: int) -> None:
    torch.manual_seed(0)
    results = []
    features = torch.randn(sum(counts), patches, 6, dtype=torch.float64)
    weight, logit_bias = torch.randn(6, dtype=torch.float64), torch.randn(sum(counts), dtype=torch.float64)
    for function in (by_loop, by_op):
        inputs = [x.clone().requires_grad_() for x in (features, weight, logit_bias)]
        out = function(*inputs, counts, context)
        out.square().sum().backward()
        results.append((out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)))
    for expected, got in zip(*results):
        assert (expected - got).abs().max() < 1e-12


def test_a_dominating_image_leaves_the_others_exact() -> None:
    """1 - a_i by subtraction gives NaN here; the mask does not."""
    features = torch.tensor([[[40.0]], [[0.0]], [[0.0]]])
    weights = image_mix_weights(features, torch.ones(1), None, ImageGroups.from_counts([3]), context="others")
    assert weights[0, :, 0].tolist() == [0.0, 0.5, 0.5]


def test_half_precision_features_are_scored_and_mixed_in_float32() -> None:
    groups = ImageGroups.from_counts([2, 3])
    features, weight = torch.randn(5, 4, 8, dtype=torch.bfloat16), torch.randn(8)
    weights = image_mix_weights(features, weight, None, groups, context="all")
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(1), torch.ones(2, 4), atol=1e-6)
    assert torch.equal(weights, image_mix_weights(features.float(), weight, None, groups, context="all"))


def test_the_bias_of_the_score_changes_nothing_and_its_gradient_is_exactly_zero() -> None:
    groups = ImageGroups.from_counts([2, 3])
    features, weight, bias = torch.randn(5, 4, 8), torch.randn(8), torch.full((1,), 3.0, requires_grad=True)
    weights = image_mix_weights(features, weight, bias, groups, context="others")
    weights.square().sum().backward()
    assert torch.equal(weights, image_mix_weights(features, weight, None, groups, context="others"))
    assert bias.grad is not None and bias.grad.tolist() == [0.0]
