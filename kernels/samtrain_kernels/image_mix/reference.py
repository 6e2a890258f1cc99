"""Mix the images of a sample patch by patch, in PyTorch: the specification of this operation.

Legend: I images in the batch, S samples (groups), N the largest number of images of a sample, P patches, C width,
K contexts: one per image (`others`, K = I) or one per sample (`all`, K = S).

    s[j, p]    = w . F[j, p] + b + logit_bias[j]
    a[k, j, p] = softmax over the images j of context k of s[j, p]
    C[k, p]    = sum_j a[k, j, p] F[j, p]

Excluded images are masked, never subtracted from a total: 1 - a loses all digits where one image dominates.
"""

import torch
from torch import Tensor

from samtrain_kernels.tables import Context, ImageTables


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what logits and softmax run in."""
    return torch.promote_types(dtype, torch.float32)


def patch_logits_reference(features: Tensor, score_weight: Tensor) -> Tensor:
    """w . F: [I, P, C] and [C] -> [I, P], float32 (float64 for float64 features)."""
    wide = wide_dtype(features.dtype)
    return features.to(wide) @ score_weight.to(wide)


def context_members(groups: ImageTables, context: Context) -> Tensor:
    """[K, N] bool: which slots of its sample a context reads."""
    if context == "all":
        return groups.valid
    slots = torch.arange(groups.valid.shape[1], device=groups.valid.device)
    return groups.valid[groups.group_of_image] & (slots != groups.slot_of_image[:, None])


def masked_softmax_reference(logits: Tensor, groups: ImageTables, *, context: Context) -> Tensor:
    """Softmax over the images of every context: [I, P] -> [K, N, P], in the dtype of `logits`."""
    logits_of_context = logits[groups.images_of_group]  # [S, N, P]
    if context == "others":
        logits_of_context = logits_of_context[groups.group_of_image]  # [I, N, P]
    member = context_members(groups, context)[:, :, None]
    # A finite floor, not -inf: an empty context would give NaN, also in the gradients of the others.
    floored = logits_of_context.masked_fill(~member, torch.finfo(logits.dtype).min)
    return floored.softmax(dim=1) * member


def mix_images(features: Tensor, weights: Tensor, groups: ImageTables, *, context: Context) -> Tensor:
    """Contextual features (or keys, or values), materialised.

    Args:
        features: [I, P, ...], any floating dtype. weights: [K, N, P] as `image_mix_weights` returns them.

    Returns:
        [K, P, ...] in the dtype of `features`; zero for an empty context.
    """
    features_of_group = features[groups.images_of_group]  # [S, N, P, ...]; invalid places: image 0 with weight 0
    weights = weights.to(features.dtype)
    if context == "all":
        return torch.einsum("snp,snp...->sp...", weights, features_of_group)
    # [I, N, P] -> [S, N, N, P], so that a sample's features are read in place and not once per context.
    by_group = weights.new_zeros(*groups.images_of_group.shape, *weights.shape[1:])
    by_group = by_group.index_put((groups.group_of_image, groups.slot_of_image), weights)
    mixed = torch.einsum("sinp,snp...->sip...", by_group, features_of_group)
    return mixed[groups.group_of_image, groups.slot_of_image]
