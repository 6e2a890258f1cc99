"""The custom operations of image mixing: what torch.compile, checkpointing and autograd see.

Legend: I images, S samples, N the largest number of images of a sample, P patches, C width, K contexts.

`samtrain_kernels::patch_logits` and its backward are opaque operations (Triton on CUDA and under TRITON_INTERPRET=1,
the reference formula on other CPUs). The softmax over images is small (K N P numbers) and stays in PyTorch, with a
backward written out: every sum runs over gathered values in a fixed order, where autograd would scatter.
"""

from typing import Any

import torch
from torch import Tensor

from samtrain_kernels.dispatch import is_interpreted
from samtrain_kernels.image_mix.reference import (
    context_members,
    masked_softmax_reference,
    patch_logits_reference,
    wide_dtype,
)
from samtrain_kernels.tables import Context, ImageTables


@torch.library.custom_op("samtrain_kernels::patch_logits", mutates_args=())
def patch_logits(features: Tensor, score_weight: Tensor) -> Tensor:
    """w . F: [I, P, C] and [C] -> [I, P], float32 (float64 for float64 features)."""
    if _runs_triton(features):
        from samtrain_kernels.image_mix import triton as kernels

        return kernels.patch_logits(_last_stride_one(features), score_weight)
    with torch.autocast(features.device.type, enabled=False):
        return patch_logits_reference(features, score_weight)


@patch_logits.register_fake
def _(features: Tensor, score_weight: Tensor) -> Tensor:
    return features.new_empty(features.shape[:2], dtype=wide_dtype(features.dtype))


@torch.library.custom_op("samtrain_kernels::patch_logits_backward", mutates_args=())
def patch_logits_backward(
    gradient: Tensor, features: Tensor, score_weight: Tensor, needs_features: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dF [I, P, C] in the dtype of `features`, dw [C] in that of `score_weight`); empty where not needed."""
    feature_gradient = torch.empty(
        features.shape if needs_features else (0,), dtype=features.dtype, device=features.device
    )
    if needs_features:
        # Into the result: the float32 products are rounded as they are written, and never stand in memory.
        torch.mul(gradient[:, :, None], score_weight.to(gradient.dtype), out=feature_gradient)
    if not needs_weight:
        return feature_gradient, score_weight.new_empty(0)
    if _runs_triton(features):
        from samtrain_kernels.image_mix import triton as kernels

        weight_gradient = kernels.score_weight_gradient(gradient, _last_stride_one(features))
    else:
        with torch.autocast(features.device.type, enabled=False):
            weight_gradient = gradient.reshape(-1) @ features.to(gradient.dtype).reshape(-1, features.shape[-1])
    return feature_gradient, weight_gradient.to(score_weight.dtype)


@patch_logits_backward.register_fake
def _(
    gradient: Tensor, features: Tensor, score_weight: Tensor, needs_features: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if needs_features else (0,)),
        score_weight.new_empty(score_weight.shape if needs_weight else (0,)),
    )


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _patch_logits_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    needs_features, needs_weight = ctx.needs_input_grad
    features, weight = patch_logits_backward(gradient, *ctx.saved_tensors, needs_features, needs_weight)
    return features if needs_features else None, weight if needs_weight else None


patch_logits.register_autograd(_patch_logits_gradients, setup_context=_save_inputs)


def masked_softmax(logits: Tensor, groups: ImageTables, *, context: Context) -> Tensor:
    """Softmax over the images of every context: [I, P] -> [K, N, P]; see `masked_softmax_reference`."""
    weights: Tensor = _MaskedSoftmax.apply(logits, groups, context)
    return weights


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, groups: ImageTables, context: Context) -> Tensor:
        return masked_softmax_reference(logits, groups, context=context)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ImageTables, Context], output: Tensor) -> None:
        _, groups, ctx.context = inputs
        ctx.groups = groups
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weights,), groups = ctx.saved_tensors, ctx.groups
        # What arrives at a slot that the context does not read is nobody's: not even a NaN may pass.
        gradient = gradient.masked_fill(~context_members(groups, ctx.context)[:, :, None], 0.0)
        of_context = weights * (gradient - (weights * gradient).sum(1, keepdim=True))  # [K, N, P]
        if ctx.context == "others":
            # An image is read by the contexts of its sample: [S, N contexts, N slots, P], summed over the contexts.
            by_group = of_context[groups.images_of_group]
            of_context = by_group.masked_fill(~groups.valid[:, :, None, None], 0.0).sum(1)
        return of_context[groups.group_of_image, groups.slot_of_image], None, None


def _runs_triton(features: Tensor) -> bool:
    return features.is_cuda or is_interpreted()


def _last_stride_one(features: Tensor) -> Tensor:
    return features if features.stride(-1) == 1 else features.contiguous()
