"""How much arithmetic a sample is, per part: what MFU divides by the time and the device's peak.

Only real work counts: no padding, no recomputation, causal attention at half. A multiply-add is two operations.
Backward passes count as often as training needs them: once more for gradients towards the input, once more again for
gradients of the weights. The count is the same for every `model.kernels`: one attention for each context, and neither
the second key/value projection of `materialised` nor the N-fold products by which the kernels mix scores.

The vision tower and the LLM are counted by running transformers' own modules on the meta device under PyTorch's
counter; the two-stream Q-Former by formula, from the same structure as guidance.py.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.initialization import no_init_weights

from samtrain.core.batch import IGNORE_INDEX, PackedBatch
from samtrain.model.configuration import SamMllmConfig
from samtrain.model.options import TrainablePartsOptions
from samtrain.model.vision import build_vision_model


@dataclass(frozen=True)
class SampleFlops:
    """Floating-point operations of one sample's forward and backward pass in training, per part."""

    vision: float
    qformer: float
    language_model: float


class FlopCounter:
    """Counts samples of one model; the expensive part happens once, here.

    Args:
        image_size: side of the square images in pixels.
        num_patches: P of the vision tower's features.
    """

    def __init__(self, config: SamMllmConfig, trains: TrainablePartsOptions, *, image_size: int) -> None:
        self.config = config
        self.trains = trains
        self._vision, self._num_patches = _count_vision(config.vision_config, image_size)
        self._per_token, self._per_token_pair = _count_language_model(config.text_config)
        self._per_label = 2.0 * config.text_config.hidden_size * config.text_config.vocab_size

    def sample(self, *, num_tokens: int, num_labels: int, num_images: int, num_text_tokens: int) -> SampleFlops:
        """A sample of `num_tokens` LLM tokens (image places included), `num_labels` of them labels, and
        `num_text_tokens` Q-Former text tokens."""
        below_llm = self.trains.guidance or self.trains.qformer or self.trains.projection or self.trains.vision
        llm_passes = 3.0 if self.trains.language_model == "full" else 2.0 if below_llm or self._has_lora else 1.0
        body = self._per_token * num_tokens + self._per_token_pair * num_tokens**2
        head = self._per_label * num_labels
        return SampleFlops(
            vision=num_images * self._vision * (3.0 if self.trains.vision else 1.0),
            qformer=self._qformer(num_images, num_text_tokens),
            language_model=llm_passes * (body + head),
        )

    def batch(self, batch: PackedBatch) -> dict[str, float]:
        """Part (vision, qformer, llm) -> operations of a pack's samples; nothing for a filler."""
        work = {"vision": 0.0, "qformer": 0.0, "llm": 0.0}
        if batch.is_empty:
            return work
        labels = torch.nn.functional.pad((batch.labels != IGNORE_INDEX).cumsum(0), (1, 0)).tolist()  # before token i
        tokens, images = batch.cu_seqlens.tolist(), batch.cu_images.tolist()
        for s, num_text_tokens in enumerate(batch.qformer_attention_mask.sum(1).tolist()):
            start, stop = tokens[s], tokens[s + 1]
            flops = self.sample(
                num_tokens=stop - start,
                num_labels=labels[stop] - labels[start],
                num_images=images[s + 1] - images[s],
                num_text_tokens=num_text_tokens,
            )
            work["vision"] += flops.vision
            work["qformer"] += flops.qformer
            work["llm"] += flops.language_model
        return work

    @property
    def _has_lora(self) -> bool:
        return self.trains.language_model == "lora"

    def _qformer(self, num_images: int, num_text_tokens: int) -> float:
        """Both streams of all layers, and the projection."""
        config, trains = self.config, self.trains
        layers, k = config.qformer_config.num_hidden_layers, config.contextual_layer
        is_guided = config.guidance_mode == "bidirectional"
        everything = trains.qformer or trains.vision
        total = 0.0
        for t in range(1, layers + 1):
            keys_values, layer = self._layer(t, num_text_tokens)
            # Frozen below guidance: the Q stream is recorded from layer k on, the W stream all along.
            q_passes = 3.0 if everything else 2.0 if is_guided and trains.guidance and t >= k else 1.0
            total += num_images * (keys_values * (3.0 if everything else 1.0) + layer * q_passes)
            if is_guided and t <= k:
                is_shared = config.guidance_context == "all" and t < config.initial_layer
                rows = 1 if is_shared else num_images
                total += rows * layer * (3.0 if everything else 2.0 if trains.guidance else 1.0)
        projection = 2.0 * config.num_query_tokens * config.qformer_config.hidden_size * config.text_config.hidden_size
        return total + num_images * projection * (3.0 if trains.projection else 2.0)

    def _layer(self, t: int, num_text_tokens: int) -> tuple[float, float]:
        """Forward operations of layer `t` (1-based) for one image: its key/value projections, and all the rest."""
        qformer, num_queries = self.config.qformer_config, self.config.num_query_tokens
        width, length = qformer.hidden_size, num_queries + num_text_tokens
        rest = 2.0 * 4 * length * width**2 + 4.0 * length**2 * width  # self-attention
        rest += 2.0 * 2 * length * width * qformer.intermediate_size
        if (t - 1) % qformer.cross_attention_frequency:
            return 0.0, rest
        rest += 2.0 * 2 * num_queries * width**2 + 4.0 * num_queries * self._num_patches * width
        return 2.0 * 2 * self._num_patches * qformer.encoder_hidden_size * width, rest


def _count(function: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return float(counter.get_total_flops())


def _count_vision(config: Any, image_size: int) -> tuple[float, int]:
    """Forward operations of one image, and the number of its patches."""
    with torch.device("meta"), no_init_weights():
        tower = build_vision_model(config).eval()
        pixels = torch.empty(1, 3, image_size, image_size)
    shape = tower(pixel_values=pixels).last_hidden_state.shape
    num_patches = shape[1] if len(shape) == 3 else shape[2] * shape[3]
    return _count(lambda: tower(pixel_values=pixels)), num_patches


def _count_language_model(config: Any) -> tuple[float, float]:
    """Forward operations of the decoder without its head: per token, and per pair of tokens (causal: half)."""
    with torch.device("meta"), no_init_weights():
        # Whatever attention training runs, this one is counted; the configuration is a copy, which it is written to.
        decoder = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    width = config.hidden_size

    def count(num_tokens: int) -> float:
        embeddings = torch.empty(1, num_tokens, width, device="meta")
        mask = torch.empty(1, 1, num_tokens, num_tokens, device="meta")  # given, or transformers would read values
        positions = torch.empty(1, num_tokens, dtype=torch.int64, device="meta")
        arguments = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions}
        return _count(lambda: decoder(**arguments, use_cache=False))

    short, long = 64, 128  # flops(T) = a T + b T^2
    pairs = (count(long) - long / short * count(short)) / (long**2 - long * short)
    return (count(short) - pairs * short**2) / short, pairs / 2
