"""The custom operations of image mixing: what torch.compile, checkpointing and autograd see.

Legend: I images, P patches, C width.

`samtrain_kernels::patch_logits` and `samtrain_kernels::patch_logits_backward` run in Triton on CUDA and under
TRITON_INTERPRET=1, and as the reference formula on other CPUs.
"""

from typing import Any

import torch
from torch import Tensor

from samtrain_kernels.dispatch import is_interpreted
from samtrain_kernels.image_mix.reference import patch_logits_reference, wide_dtype


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


def _runs_triton(features: Tensor) -> bool:
    return features.is_cuda or is_interpreted()


def _last_stride_one(features: Tensor) -> Tensor:
    return features if features.stride(-1) == 1 else features.contiguous()
