"""The custom operations of context attention: what torch.compile, checkpointing and autograd see.

`samtrain_kernels::context_attention` and `samtrain_kernels::context_attention_backward` run in Triton on CUDA and under
TRITON_INTERPRET=1, and as the reference formulas on other CPUs and for float64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samtrain_kernels.context_attention.reference import (
    AttentionInputs,
    context_attention_backward_reference,
    context_attention_reference,
)
from samtrain_kernels.dispatch import is_interpreted
from samtrain_kernels.image_mix.reference import wide_dtype

NUM_DIFFERENTIABLE = 6
"""query, key, value, weights, key_bias, value_bias: the first arguments of the operation."""


class Tables(NamedTuple):
    """`ImageTables` out of the tensors that an operation is given."""

    group_of_image: Tensor
    slot_of_image: Tensor
    images_of_group: Tensor
    valid: Tensor
    cu_images: Tensor


@torch.library.custom_op("samtrain_kernels::context_attention", mutates_args=())
def context_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    group_of_image: Tensor,
    slot_of_image: Tensor,
    images_of_group: Tensor,
    valid: Tensor,
    cu_images: Tensor,
    context: str,
    queries: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [R, Q, H, D] and lse [R, H, Q]; see `AttentionInputs` and `context_attention_reference`."""
    tables = Tables(group_of_image, slot_of_image, images_of_group, valid, cu_images)
    x = AttentionInputs(query, key, value, weights, key_bias, value_bias, tables, context, queries, scale)  # type: ignore[arg-type]
    if key.shape[0] == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format), _empty_lse(query).zero_()
    if _runs_triton(query):
        from samtrain_kernels.context_attention import triton as kernels

        return kernels.forward(x)
    with torch.autocast(query.device.type, enabled=False):
        return context_attention_reference(x)


@context_attention_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _empty_lse(query)


@torch.library.custom_op("samtrain_kernels::context_attention_backward", mutates_args=())
def context_attention_backward_op(
    output_gradient: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    group_of_image: Tensor,
    slot_of_image: Tensor,
    images_of_group: Tensor,
    valid: Tensor,
    cu_images: Tensor,
    context: str,
    queries: str,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of query, key, value, weights, key_bias, value_bias that `needs` asks for, in this order."""
    tables = Tables(group_of_image, slot_of_image, images_of_group, valid, cu_images)
    x = AttentionInputs(query, key, value, weights, key_bias, value_bias, tables, context, queries, scale)  # type: ignore[arg-type]
    if key.shape[0] == 0:
        return [
            gradient.zero_() for gradient in _empty_gradients((query, key, value, weights, key_bias, value_bias), needs)
        ]
    if _runs_triton(query):
        from samtrain_kernels.context_attention import triton as kernels

        return kernels.backward(x, output_gradient, output, lse, needs)
    with torch.autocast(query.device.type, enabled=False):
        return context_attention_backward_reference(x, output_gradient, output, lse, needs)


@context_attention_backward_op.register_fake
def _(
    output_gradient: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor,
    key_bias: Tensor | None, value_bias: Tensor | None, group_of_image: Tensor, slot_of_image: Tensor,
    images_of_group: Tensor, valid: Tensor, cu_images: Tensor, context: str, queries: str, scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return _empty_gradients((query, key, value, weights, key_bias, value_bias), needs)


def _empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]


def _empty_lse(query: Tensor) -> Tensor:
    num_sets, num_queries, num_heads, _ = query.shape
    return query.new_empty(num_sets, num_heads, num_queries, dtype=wide_dtype(query.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.context, ctx.queries, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, output_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    output, lse, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:NUM_DIFFERENTIABLE])
    num_others = len(ctx.needs_input_grad) - NUM_DIFFERENTIABLE
    if not any(needs):
        return (None,) * len(ctx.needs_input_grad)
    gradients = iter(
        context_attention_backward_op(
            output_gradient, output, lse, *tensors, ctx.context, ctx.queries, ctx.scale, needs
        )
    )
    return *(next(gradients) if needed else None for needed in needs), *(None,) * num_others


context_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _runs_triton(query: Tensor) -> bool:
    return (query.is_cuda or is_interpreted()) and query.dtype != torch.float64
