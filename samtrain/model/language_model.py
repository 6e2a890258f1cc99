"""Calls of the language model: positions of packed samples, logits only where a label needs them (`attention.py` keeps
samples to themselves).

Legend: B rows, T tokens, S samples of a pack, L labels that count, V vocabulary.

Logits go through the model's own forward (`logits_to_keep`), so that ZeRO-3 gathers lm_head by its hooks and models
that scale or cap their logits stay right.
"""

import inspect

import torch
from torch import Tensor, nn

from samtrain.core.batch import IGNORE_INDEX
from samtrain.core.errors import ConfigError


def check_language_model(language_model: nn.Module) -> None:
    """Raise ConfigError, naming the class, where the model lacks what packing needs."""
    name = type(language_model).__name__
    accepted = inspect.signature(language_model.forward).parameters
    for needed in ("inputs_embeds", "position_ids", "logits_to_keep"):
        if needed not in accepted:
            raise ConfigError(
                f"{name} takes no `{needed}`, so samples cannot be packed; use a decoder-only model with position ids, "
                "such as Llama, Qwen, OPT or GPT-2"
            )


def packed_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: positions that start again at 0 with every sample."""
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    return position - cu_seqlens.long()[torch.searchsorted(cu_seqlens[1:].long(), position, right=True)]


def padded_positions(attention_mask: Tensor) -> Tensor:
    """[B, T] int64: positions that count the visible tokens of a row; padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def label_targets(labels: Tensor, num_label_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """What to predict, and where.

    Args:
        labels: [B, T], aligned with the inputs (B = 1 for a pack).
        num_label_tokens: how many labels of a pack count (B = 1); None: read from the device, which waits for it.

    Returns:
        columns: [C] int64, the positions whose *next* label counts in some row; at least one, so that lm_head is called
            on every rank. targets: [B, C], the labels to predict there (IGNORE_INDEX where a row has none).
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    counts = (following != IGNORE_INDEX).any(0)
    if num_label_tokens is None:
        num_label_tokens = int(counts.sum())
    columns = counts.nonzero_static(size=max(1, num_label_tokens), fill_value=0)[:, 0]
    return columns, following[:, columns]
