"""Image mixing against a loop over samples, images and patches."""

from typing import Any

import pytest
import torch
from samtrain_kernels import image_mix_weights, mix_images
from torch import Tensor

from samtrain.core.batch import ImageGroups


def by_loop(scores: Tensor, features: Tensor, counts: list[int], context: str) -> Tensor:
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


def by_op(scores: Tensor, features: Tensor, counts: list[int], context: Any) -> Tensor:
    groups = ImageGroups.from_counts(counts)
    tables = {
        "group_of_image": groups.group_of_image,
        "slot_of_image": groups.slot_of_image,
        "images_of_group": groups.images_of_group,
    }
    weights = image_mix_weights(scores, valid=groups.valid, context=context, **tables)
    return mix_images(features, weights, context=context, **tables)  # fmt: skip


@pytest.mark.parametrize("context", ["others", "all"])
@pytest.mark.parametrize("counts", [[1], [2], [5], [2, 1, 3], [0, 2, 0, 4]])
@pytest.mark.parametrize("patches", [1, 7])
def test_mix_and_gradients_equal_the_loop(context: str, counts: list[int], patches: int) -> None:
    torch.manual_seed(0)
    results = []
    scores = torch.randn(sum(counts), patches, dtype=torch.float64) * 3
    features = torch.randn(sum(counts), patches, 6, dtype=torch.float64)
    for function in (by_loop, by_op):
        s, f = scores.clone().requires_grad_(), features.clone().requires_grad_()
        out = function(s, f, counts, context)
        out.square().sum().backward()
        results.append((out.detach(), torch.zeros_like(s) if s.grad is None else s.grad, f.grad))
    for expected, got in zip(*results):
        assert (torch.zeros_like(got) if expected is None else expected).sub(got).abs().max() < 1e-12


def test_a_dominating_image_leaves_the_others_exact() -> None:
    """1 - a_i by subtraction gives NaN here; the mask does not."""
    groups = ImageGroups.from_counts([3])
    scores = torch.tensor([[40.0], [0.0], [0.0]])
    weights = image_mix_weights(
        scores, group_of_image=groups.group_of_image, slot_of_image=groups.slot_of_image,
        images_of_group=groups.images_of_group, valid=groups.valid, context="others",
    )  # fmt: skip
    assert weights[0, :, 0].tolist() == [0.0, 0.5, 0.5]


def test_half_precision_scores_are_mixed_in_float32() -> None:
    groups = ImageGroups.from_counts([2, 3])
    scores = torch.randn(5, 4, dtype=torch.bfloat16)
    weights = image_mix_weights(
        scores, group_of_image=groups.group_of_image, slot_of_image=groups.slot_of_image,
        images_of_group=groups.images_of_group, valid=groups.valid, context="all",
    )  # fmt: skip
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(1), torch.ones(2, 4), atol=1e-6)
