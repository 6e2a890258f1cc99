"""The vision tower: any transformers (or timm, through transformers) backbone, called once for all images of a batch.

Legend: I images, P patches, C width of the features, H, W size of a feature map.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, InstructBlipVisionModel, PretrainedConfig, PreTrainedModel


def build_vision_model(config: PretrainedConfig) -> PreTrainedModel:
    """The tower of a configuration, with random weights. InstructBLIP's has no AutoModel entry of its own."""
    if config.model_type == "instructblip_vision_model":
        return InstructBlipVisionModel._from_config(config)
    tower: Any = MODEL_MAPPING[type(config)]
    if not getattr(tower, "_supports_sdpa", False):
        config._attn_implementation = "eager"  # what the whole model asked for would be refused
    return tower._from_config(config)


def patch_features(tower: nn.Module, pixel_values: Tensor) -> Tensor:
    """Features of every patch of every image.

    A tower that returns tokens [I, P, C] is taken as it is, its own final norm included. One that returns a feature map
    [I, C, H, W] (convolutional) has neither a norm nor positions: the map is normalised over C, without parameters, and
    gets fixed sine-cosine positions, since the Q-Former's attention cannot tell places apart otherwise.

    Args:
        pixel_values: [I, 3, height, width].

    Returns:
        [I, P, C].
    """
    output = tower(pixel_values=pixel_values.to(_dtype(tower)))
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        _, width, rows, columns = hidden.shape
        hidden = nn.functional.layer_norm(hidden.flatten(2).transpose(1, 2), (width,))
        hidden = hidden + sine_cosine_positions(rows, columns, width, device=hidden.device).to(hidden.dtype)
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None and pooled.requires_grad:
        # Parameters that only the unused pooled output reads (CLIP's last norm) must still get a gradient, a zero one:
        # ZeRO-3 would apply their previous gradient again.
        hidden = hidden + 0.0 * pooled.sum()
    return hidden


def sine_cosine_positions(rows: int, columns: int, width: int, *, device: torch.device) -> Tensor:
    """Fixed positions of a rows x columns map, [rows * columns, width] float32; a quarter of the width each for the
    sine and cosine of row and column, zero where 4 does not divide the width."""
    quarter = width // 4
    # Wavelengths from 2 pi to 2 pi * 100: maps are 7 to 40 places wide, sentences (10,000) are not.
    rates = torch.exp(-math.log(100.0) * torch.arange(quarter, device=device, dtype=torch.float32) / max(quarter, 1))
    angles = [torch.arange(n, device=device, dtype=torch.float32)[:, None] * rates for n in (rows, columns)]
    by_row = torch.cat([angles[0].sin(), angles[0].cos()], 1)[:, None].expand(rows, columns, 2 * quarter)
    by_column = torch.cat([angles[1].sin(), angles[1].cos()], 1)[None].expand(rows, columns, 2 * quarter)
    positions = torch.cat([by_row, by_column], 2).reshape(rows * columns, 4 * quarter)
    return nn.functional.pad(positions, (0, width - 4 * quarter))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
