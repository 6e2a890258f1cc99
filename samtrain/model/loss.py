"""The loss of the language model: summed next-token cross-entropy, without a float32 copy of all logits.

PyTorch's cross_entropy of half-precision logits in float32 holds three [R, V] float32 tensors (the copy, its
log-softmax, the gradient). Here a few rows at a time are float32; what stays are the logits, one number for each row,
and in the backward pass the gradient in the logits' own dtype. Only logits are read, never lm_head's weight: it is
called once, as a module, so ZeRO-3 gathers it by its hooks, equally often on every rank.

Legend: R rows (label positions), V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samtrain.core.batch import IGNORE_INDEX

CHUNK_ELEMENTS = 2**24  # of logits that are float32 at a time: 64 MiB, 524 rows of Vicuna's vocabulary


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits [..., V] and targets [...], summed over the targets that count.

    Returns:
        0-d float32 (or wider, as the logits); 0.0, connected, where no target counts. It can be differentiated once.
    """
    return _SummedCrossEntropy.apply(logits.flatten(0, -2), targets.flatten())


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        log_sums = []
        for some, wanted in _chunks(logits, targets):
            some = some.to(wide)
            log_sum = some.logsumexp(-1)
            chosen = some.gather(-1, wanted.clamp(min=0)[:, None])[:, 0]
            total += (log_sum - chosen).masked_fill(wanted == IGNORE_INDEX, 0.0).sum()
            log_sums.append(log_sum)
        ctx.save_for_backward(logits, targets, torch.cat(log_sums))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """softmax - one-hot, of the rows that count."""
        logits, targets, log_sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        start = 0
        for some, wanted in _chunks(logits, targets):
            rows = slice(start, start + len(wanted))
            change = (some - log_sums[rows, None]).exp_()  # float32, by promotion
            change.scatter_add_(-1, wanted.clamp(min=0)[:, None], change.new_full((1, 1), -1.0).expand(len(wanted), 1))
            result[rows] = change.mul_(gradient).masked_fill_((wanted == IGNORE_INDEX)[:, None], 0.0)
            start = rows.stop
        return result, None


def _chunks(logits: Tensor, targets: Tensor) -> Any:
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return zip(logits.split(rows), targets.split(rows), strict=True)
