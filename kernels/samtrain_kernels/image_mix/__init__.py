"""Contextual features: for every patch position, a softmax over the images of a context (arXiv 2408.12867, section 3).

Legend: I images in the batch, N the largest number of images of a sample, P patches, C width, K contexts: one per image
(`others`, K = I) or one per sample (`all`).
"""

from typing import Literal

import torch
from torch import Tensor

from samtrain_kernels.image_mix.op import patch_logits
from samtrain_kernels.image_mix.reference import (
    masked_softmax_reference,
    mix_images,
    patch_logits_reference,
    wide_dtype,
)
from samtrain_kernels.image_mix.softmax import masked_softmax
from samtrain_kernels.tables import Context, ImageTables

__all__ = ["image_mix_weights", "mix_images"]


def image_mix_weights(
    features: Tensor,
    score_weight: Tensor,
    score_bias: Tensor | None,
    groups: ImageTables,
    *,
    context: Context,
    logit_bias: Tensor | None = None,
    backend: Literal["triton", "reference"] = "reference",
) -> Tensor:
    """Softmax weights over the images of every context, for every patch.

    Autocast does not reach in: logits and softmax are float32, or float64 for float64 features. Call it from the
    forward of the module that owns `score_weight`, so that ZeRO-3 has gathered it.

    Args:
        features: [I, P, C], float16, bfloat16, float32 or float64, last stride 1.
        score_weight: [C]. score_bias: [] or [1], or None; it moves all logits alike, so the result does not depend on
            it and its gradient is exactly zero. It is an argument so that the parameter stays in the graph.
        logit_bias: [I], added to every patch logit of an image (the order embedding), or None.

    Returns:
        [K, N, P], summing to one over N; exactly zero at the slots that a context does not read, so all zero for an
        empty context (N = 1 with `others`).

    Raises:
        ValueError: shapes disagree, or the context or backend is unknown.
    """
    if context not in ("others", "all"):
        raise ValueError(f"context {context!r} is unknown; choose others or all")
    if backend not in ("triton", "reference"):
        raise ValueError(f"backend {backend!r} is unknown to image_mix_weights; choose triton or reference")
    if features.dim() != 3 or score_weight.shape != features.shape[-1:]:
        raise ValueError(
            f"features {tuple(features.shape)} and score_weight {tuple(score_weight.shape)} must be [I, P, C] and [C]"
        )
    if logit_bias is not None and logit_bias.shape != features.shape[:1]:
        raise ValueError(f"logit_bias {tuple(logit_bias.shape)} must be [I] = [{features.shape[0]}]")
    with torch.autocast(features.device.type, enabled=False):
        logits = (patch_logits if backend == "triton" else patch_logits_reference)(features, score_weight)
        if logit_bias is not None:
            logits = logits + logit_bias.to(wide_dtype(features.dtype))[:, None]
        if score_bias is not None:
            # Times zero: the true gradient is zero, and the rounding noise of a computed one would, divided by
            # itself in Adam, move the parameter by whole learning rates.
            logits = logits + 0.0 * score_bias.to(logits.dtype).reshape(())
        softmax = masked_softmax if backend == "triton" else masked_softmax_reference
        return softmax(logits, groups, context=context)
