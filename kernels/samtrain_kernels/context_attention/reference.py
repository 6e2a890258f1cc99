"""Cross-attention over contexts of several images, in PyTorch: the specification of this operation.

Legend: I images, S samples (groups), N the largest number of images of a sample, P patches, H heads, D width of a head,
Q queries of a query set, R query sets: one per image (`queries="image"`, R = I) or one per sample (`"group"`, R = S),
K contexts: one per image (`others`, K = I) or one per sample (`all`, K = S).

With a[k, j, p] the weight of image j in context k at patch p, and j over the images that context k reads,

    key_k[p] = sum_j a[k, j, p] (key_j[p] + key_bias_j)        value_k[p] likewise
    O[q]     = sum_p softmax_p(scale * Q[q] . key_k[p]) value_k[p]

Products and softmax run in float32, or float64 for float64 inputs. A context that reads no image gives exactly 0.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from samtrain_kernels.image_mix.reference import context_members, mix_images, wide_dtype
from samtrain_kernels.tables import Context, ImageTables

Queries = Literal["image", "group"]
"""Whose the query sets are: one for each image, or one for each sample (with `all`, while its images share them)."""

LOG2E = math.log2(math.e)


class AttentionInputs(NamedTuple):
    """What every implementation gets.

    query: [R, Q, H, D]. key, value: [I, P, H, D]. weights: [K, N, P] float32 (float64 with float64 queries); what
    stands at slots that a context does not read is ignored. key_bias, value_bias: [I, H, D] or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor
    key_bias: Tensor | None
    value_bias: Tensor | None
    groups: ImageTables
    context: Context
    queries: Queries
    scale: float

    @property
    def contexts_are_shared(self) -> bool:
        """True where several query sets read the same context."""
        return self.context == "all" and self.queries == "image"

    def live_weights(self) -> Tensor:
        """[K, N, P], zero at slots that a context does not read."""
        return self.weights.masked_fill(~self.members(), 0.0)

    def members(self) -> Tensor:
        """[K, N, 1] bool: the slots that a context reads."""
        return context_members(self.groups, self.context)[:, :, None]


def context_attention_reference(x: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The output [R, Q, H, D] in the dtype of the query, and log2 of the softmax' denominators, wide, [R, H, Q]."""
    keys, values = _mixed(x, x.key, x.key_bias), _mixed(x, x.value, x.value_bias)
    if x.contexts_are_shared:
        keys, values = keys[x.groups.group_of_image], values[x.groups.group_of_image]
    scores = x.scale * torch.einsum("rqhd,rphd->rhqp", x.query.to(keys.dtype), keys)
    output = torch.einsum("rhqp,rphd->rqhd", scores.softmax(-1), values)
    return output.to(x.query.dtype).contiguous(), scores.logsumexp(-1) * LOG2E


def context_attention_backward_reference(
    x: AttentionInputs, output_gradient: Tensor, output: Tensor, lse: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of query, key, value, weights, key_bias, value_bias that `needs` asks for, in this order."""
    groups, keys, values = x.groups, _mixed(x, x.key, x.key_bias), _mixed(x, x.value, x.value_bias)
    if x.contexts_are_shared:
        keys, values = keys[groups.group_of_image], values[groups.group_of_image]
    query, do = x.query.to(keys.dtype), output_gradient.to(keys.dtype)
    p = torch.exp2(torch.einsum("rqhd,rphd->rhqp", query, keys) * (x.scale * LOG2E) - lse[..., None])
    dp = torch.einsum("rqhd,rphd->rhqp", do, values)
    delta = (do * output).sum(-1).transpose(1, 2)  # [R, H, Q]
    ds = x.scale * p * (dp - delta[..., None])
    dk, dv = torch.einsum("rhqp,rqhd->rphd", ds, query), torch.einsum("rhqp,rqhd->rphd", p, do)  # of mixed ones
    if x.contexts_are_shared:
        dk, dv = sum_of_group(dk, groups), sum_of_group(dv, groups)  # [K, P, H, D]
    dw = _mixing_dots(x, dk, _with_bias(x.key, x.key_bias)) + _mixing_dots(x, dv, _with_bias(x.value, x.value_bias))
    dk, dv = _back_to_images(x, dk), _back_to_images(x, dv)  # [I, P, H, D]
    gradients = [
        torch.einsum("rhqp,rphd->rqhd", ds, keys).to(x.query.dtype),
        dk.to(x.key.dtype),
        dv.to(x.value.dtype),
        dw.masked_fill(~x.members(), 0.0).to(x.weights.dtype),
        dk.sum(1).to(x.key.dtype),
        dv.sum(1).to(x.value.dtype),
    ]
    return [gradient.contiguous() for gradient, needed in zip(gradients, needs, strict=True) if needed]


def sum_of_group(x: Tensor, groups: ImageTables) -> Tensor:
    """Sum over the images of every sample: [I, ...] -> [S, ...]. A gather, so that the order of the sum is fixed."""
    mask = groups.valid.reshape(*groups.valid.shape, *[1] * (x.dim() - 1))
    return x[groups.images_of_group].masked_fill(~mask, 0.0).sum(1)


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """[I, P, H, D] + [I, 1, H, D], wide."""
    wide = x.to(wide_dtype(x.dtype))
    return wide if bias is None else wide + bias.to(wide.dtype)[:, None]


def _mixed(x: AttentionInputs, images: Tensor, bias: Tensor | None) -> Tensor:
    """Keys or values of the contexts: [I, P, H, D] -> [K, P, H, D], wide."""
    return mix_images(_with_bias(images, bias), x.live_weights(), x.groups, context=x.context)


# The two transposes of mixing, by sample: [S, M, ...] against [S, N, ...] with M the contexts of a sample, 1 or N.


def _by_group(x: AttentionInputs, contexts: Tensor) -> Tensor:
    """[K, ...] -> [S, M, ...]; places of images that do not exist hold image 0."""
    return contexts[:, None] if x.context == "all" else contexts[x.groups.images_of_group]


def _mixing_dots(x: AttentionInputs, gradient: Tensor, images: Tensor) -> Tensor:
    """gradient[k, p] . images[j, p] for the images j of the sample of k: [K, P, H, D], [I, P, H, D] -> [K, N, P]."""
    groups = x.groups
    dots = torch.einsum("smphd,snphd->smnp", _by_group(x, gradient), images[groups.images_of_group])
    return dots[:, 0] if x.context == "all" else dots[groups.group_of_image, groups.slot_of_image]


def _back_to_images(x: AttentionInputs, gradient: Tensor) -> Tensor:
    """sum over the contexts k of a[k, j, p] gradient[k, p]: [K, P, H, D] -> [I, P, H, D]."""
    groups, weights = x.groups, _by_group(x, x.live_weights()).to(gradient.dtype)  # [S, M, N, P]
    if x.context == "others":
        weights = weights.masked_fill(~groups.valid[:, :, None, None], 0.0)
    of_group = torch.einsum("smnp,smphd->snphd", weights, _by_group(x, gradient))
    return of_group[groups.group_of_image, groups.slot_of_image]
