"""The switch `model.attn_implementation`: attention of the language model, which keeps the samples of a pack apart.

    flash_attention_2  variable lengths; flash-attn on a GPU. No GPU has run it yet
    flex_attention     PyTorch's FlexAttention, compiled by Triton, with a mask of 128 x 128 blocks; on a GPU (none has
                       run it yet); on a CPU it has no backward pass
    sdpa, eager        a dense mask [T, T]: other samples of the pack cost time, though they have no effect
    auto               on a GPU the first of these that can run; on a CPU sdpa

The vision tower and the Q-Former have neither packs nor causality: for them the first two mean sdpa.
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from samtrain.core.errors import ConfigError

Implementation = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]


def choose_attention(
    asked: Implementation | Literal["auto"], text_config: PretrainedConfig, *, device_type: str
) -> Implementation:
    """What runs on `device_type` ("cuda", "cpu").

    Raises:
        ConfigError: the one asked for cannot run there.
    """
    if asked == "auto":
        faster: tuple[Implementation, ...] = ("flash_attention_2", "flex_attention")
        return next((one for one in faster if not _obstacle(one, text_config, device_type=device_type)), "sdpa")
    obstacle = _obstacle(asked, text_config, device_type=device_type)
    if obstacle:
        raise ConfigError(f"model.attn_implementation: {asked}, but {obstacle}; choose sdpa or auto")
    return asked


def packed_attention(
    cu_seqlens: Tensor, *, max_seqlen: int | None, num_tokens: int, dtype: torch.dtype, attn_implementation: str
) -> dict[str, Any]:
    """Keyword arguments that keep every sample of a pack to itself, causal within; made once for all layers.

    transformers' own detection by position_ids is not relied upon: with an all-ones mask or a cache it leaks across
    samples silently.

    Args:
        cu_seqlens: [S+1] int32 on the model's device.
        max_seqlen: tokens of the longest sample, for flash_attention_2; None: read from the device, which waits for it.
    """
    if attn_implementation == "flash_attention_2":
        cu_seqlens = cu_seqlens.to(torch.int32)
        if max_seqlen is None:
            max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return {
            "attention_mask": None,
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
        }
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    sample = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)  # [T]
    if attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def is_visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (sample[query] == sample[key]) & (query >= key)

        return {"attention_mask": create_block_mask(is_visible, 1, None, num_tokens, num_tokens, device=sample.device)}
    visible = (sample[:, None] == sample) & (position[:, None] >= position)
    mask = torch.zeros(num_tokens, num_tokens, dtype=dtype, device=visible.device)
    return {"attention_mask": mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]}


def _obstacle(one: Implementation, text_config: PretrainedConfig, *, device_type: str) -> str | None:
    """Why it cannot run, or None where it can."""
    if one in ("eager", "sdpa"):
        return None
    if device_type != "cuda":
        return f"it needs a GPU and this runs on {device_type}"
    if one == "flash_attention_2":
        is_missing = importlib.util.find_spec("flash_attn") is None
        return "flash-attn is not installed" if is_missing else _unsupported(text_config, "_supports_flash_attn")
    if getattr(text_config, "attention_dropout", 0.0):
        return f"it has no dropout and attention_dropout is {text_config.attention_dropout}"
    return _unsupported(text_config, "_supports_flex_attn")


def _unsupported(text_config: PretrainedConfig, flag: str) -> str | None:
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    return None if getattr(model, flag, False) else f"transformers has none for {text_config.model_type}"
