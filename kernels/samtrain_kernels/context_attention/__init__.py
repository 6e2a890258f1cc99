"""Cross-attention of the W stream over its context images, without materialising the context (arXiv 2408.12867,
section 3; the mathematics is in `reference`).

Legend: I images, S samples, N the largest number of images of a sample, P patches, H heads, D width of a head,
Q queries of a query set, R query sets: one per image (I) or, while the images of a sample share them, one per sample
(S), K contexts: one per image (`others`, K = I) or one per sample (`all`, K = S).
"""

from typing import Literal

import torch
from torch import Tensor

from samtrain_kernels.context_attention.op import context_attention_op
from samtrain_kernels.context_attention.reference import AttentionInputs, Queries, context_attention_reference
from samtrain_kernels.tables import Context, ImageTables

__all__ = ["context_attention"]


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    groups: ImageTables,
    *,
    context: Context,
    queries: Queries = "image",
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    scale: float | None = None,
    backend: Literal["triton", "reference"] = "reference",
) -> Tensor:
    """Attend to every patch of a context: softmax over patches of queries against the mixed keys of its images.

    Under autocast queries, keys, values and biases take its dtype; weights and softmax stay float32. With `triton` the
    result can be differentiated once.

    Args:
        query: [R, Q, H, D]. key, value: [I, P, H, D], views of a packed [I, P, 2, H, D] for instance. All of one dtype:
            float16, bfloat16, float32 or float64 (which `triton` computes by the reference's formulas).
        weights: [K, N, P] of `image_mix_weights`, float32 (float64 for float64 queries). What stands at slots that a
            context does not read is ignored, and its gradient is exactly zero.
        queries: `image`: a query set for every image; `group`: one for every sample, with context `all` only.
        key_bias, value_bias: [I, H, D], added to every patch of an image, in the dtype of `query`.
        scale: of the scores; D**-0.5 where None.
        backend: `triton` wants D to be a power of two, at least 16.

    Returns:
        [R, Q, H, D] in the dtype of `query`; exactly zero for a context without images (N = 1 with `others`).

    Raises:
        ValueError: shapes, dtypes or choices that do not go together.
    """
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
        key_bias = None if key_bias is None else _autocast(key_bias)
        value_bias = None if value_bias is None else _autocast(value_bias)
    _check(query, key, value, weights, groups, context, queries, key_bias, value_bias, backend)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "triton":
        tables = groups.group_of_image, groups.slot_of_image, groups.images_of_group, groups.valid, groups.cu_images
        return context_attention_op(query, key, value, weights, key_bias, value_bias, *tables, context, queries, scale)[
            0
        ]
    with torch.autocast(query.device.type, enabled=False):
        return context_attention_reference(
            AttentionInputs(query, key, value, weights, key_bias, value_bias, groups, context, queries, scale)
        )[0]


def _autocast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    groups: ImageTables,
    context: str,
    queries: str,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    backend: str,
) -> None:
    if context not in ("others", "all"):
        raise ValueError(f"context {context!r} is unknown; choose others or all")
    if queries not in ("image", "group") or (queries == "group" and context != "all"):
        raise ValueError(f"queries {queries!r} with context {context!r}: choose image, or group with all")
    if backend not in ("triton", "reference"):
        raise ValueError(f"backend {backend!r} is unknown to context_attention; choose triton or reference")
    num_groups, num_slots = groups.valid.shape
    num_images, num_patches, num_heads, head_dim = key.shape
    num_sets = num_groups if queries == "group" else num_images
    expected = {
        "query": (query, (num_sets, query.shape[1], num_heads, head_dim)),
        "value": (value, tuple(key.shape)),
        "weights": (weights, (num_images if context == "others" else num_groups, num_slots, num_patches)),
        "key_bias": (key_bias, (num_images, num_heads, head_dim)),
        "value_bias": (value_bias, (num_images, num_heads, head_dim)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape} for keys {tuple(key.shape)}")
        if x is not None and name != "weights" and x.dtype != key.dtype:
            raise ValueError(f"{name} is {x.dtype} but the keys are {key.dtype}; cast them to one dtype")
    if weights.dtype != torch.promote_types(key.dtype, torch.float32):
        raise ValueError(
            f"weights are {weights.dtype}; with {key.dtype} keys they must be float32 (float64 with float64)"
        )
    if backend == "triton" and (head_dim < 16 or head_dim & (head_dim - 1)):
        raise ValueError(
            f"heads are {head_dim} wide; the Triton kernels want a power of two, at least 16. "
            "Choose the backend reference or materialised"
        )
