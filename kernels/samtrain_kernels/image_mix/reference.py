"""Mix the images of a sample patch by patch.

Legend: I images in the batch, S samples (groups), N the largest number of images of a sample, P patches, C width,
K contexts: one per image (`others`) or one per sample (`all`).

    a[k, j, p] = softmax over the images j of context k of score[j, p]
    C[k, p]    = sum_j a[k, j, p] F[j, p]

The index tables are those of `samtrain.core.batch.ImageGroups`, built on the host: nothing here waits for the device.
Excluded images are masked, never subtracted from a total: 1 - a loses all digits where one image dominates.
"""

from typing import Literal

import torch
from torch import Tensor


def image_mix_weights(
    scores: Tensor,
    *,
    group_of_image: Tensor,
    slot_of_image: Tensor,
    images_of_group: Tensor,
    valid: Tensor,
    context: Literal["others", "all"],
) -> Tensor:
    """Softmax weights over the image axis for every context and patch.

    Args:
        scores: [I, P], the patch scores s_j[p]. The softmax runs in float32, or wider where the scores are wider.
        group_of_image, slot_of_image: [I] int64, the sample of an image and its place in it.
        images_of_group: [S, N] int64; valid: [S, N] bool.
        context: `others`: the images of the sample except the context's own; `all`: all of them.

    Returns:
        [K, N, P]: rows sum to one over N; all zero where a context has no image (N = 1 with `others`).
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores_of_group = wide[images_of_group]  # [S, N, P]
    if context == "all":
        member, scores_of_context = valid, scores_of_group
    else:
        slots = torch.arange(valid.shape[1], device=valid.device)
        member = valid[group_of_image] & (slots != slot_of_image[:, None])  # [I, N]
        scores_of_context = scores_of_group[group_of_image]  # [I, N, P]
    member = member[:, :, None]
    # A finite floor, not -inf: an empty context would give NaN, also in the gradients of the others.
    floored = scores_of_context.masked_fill(~member, torch.finfo(wide.dtype).min)
    return floored.softmax(dim=1) * member


def mix_images(
    features: Tensor,
    weights: Tensor,
    *,
    group_of_image: Tensor,
    slot_of_image: Tensor,
    images_of_group: Tensor,
    context: Literal["others", "all"],
) -> Tensor:
    """Contextual features, materialised.

    Args:
        features: [I, P, C], any floating dtype. weights: [K, N, P] as `image_mix_weights` returns them.

    Returns:
        [K, P, C] in the dtype of `features`; zero for an empty context.
    """
    features_of_group = features[images_of_group]  # [S, N, P, C]; invalid places repeat image 0 with weight 0
    weights = weights.to(features.dtype)
    if context == "all":
        return torch.einsum("snp,snpc->spc", weights, features_of_group)
    # [I, N, P] -> [S, N, N, P], so that a sample's features are read in place and not once per context.
    by_group = weights.new_zeros(*images_of_group.shape, *weights.shape[1:])
    by_group = by_group.index_put((group_of_image, slot_of_image), weights)
    mixed = torch.einsum("sinp,snpc->sipc", by_group, features_of_group)
    return mixed[group_of_image, slot_of_image]
