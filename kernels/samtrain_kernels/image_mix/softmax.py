"""The softmax over the images of a context, with its backward written out.

Legend: I images, S samples, N the largest number of images of a sample, P patches, K contexts.

It is small (K N P numbers) and stays in PyTorch. In the backward every sum runs over gathered values in a fixed order,
where autograd would scatter into the logits.
"""

from typing import Any

import torch
from torch import Tensor

from samtrain_kernels.image_mix.reference import context_members, masked_softmax_reference
from samtrain_kernels.tables import Context, ImageTables


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
