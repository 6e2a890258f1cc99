"""SAM multi-image model: vision tower -> two-stream Q-Former -> projection -> language model.

Everything that reads parameters runs inside the root module's forward (generation's prefix too): under ZeRO-3
parameters are empty elsewhere. Parameter names are those of transformers' InstructBlipForConditionalGeneration, plus
`guidance.*`, so its checkpoints load by name.

Legend: T tokens (packed [T] or padded [B, T]), S samples (the rows, when padded), I images, P patches, C width of the
vision features, Q query tokens, D width of the Q-Former, E width of the language model, Tq Q-Former text tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from samtrain_kernels import Backend
from samtrain_kernels.dispatch import ResolvedBackend
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, InstructBlipQFormerModel, PreTrainedModel, initialization
from transformers.generation.logits_process import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from samtrain.core.batch import IGNORE_INDEX, ImageGroups
from samtrain.core.errors import BatchError, ConfigError
from samtrain.model.attention import packed_attention
from samtrain.model.configuration import SamMllmConfig
from samtrain.model.freezing import keep_frozen_parts_in_eval
from samtrain.model.guidance import Guidance, extract_visual_tokens
from samtrain.model.kernels import choose_kernels
from samtrain.model.language_model import (
    check_language_model,
    label_targets,
    packed_positions,
    padded_positions,
)
from samtrain.model.loss import summed_loss
from samtrain.model.vision import build_vision_model, patch_features


@dataclass
class SamMllmOutput(ModelOutput):
    """What forward returns.

    loss: mean over the label tokens of this call. loss_sum: its sum, 0-d float32, connected to every trainable
    parameter. num_label_tokens: 0-d int64. logits: [B, T, V] (B = 1 for a pack) where asked for.
    query_outputs: [I, Q, D]. inputs_embeds: [B, T, E], image spans filled in.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    num_label_tokens: Tensor | None = None
    logits: Tensor | None = None
    query_outputs: Tensor | None = None
    inputs_embeds: Tensor | None = None


class SamMllmForConditionalGeneration(PreTrainedModel):
    """Several images and a text in, text out; images of a sample guide each other's extraction."""

    config: SamMllmConfig
    config_class = SamMllmConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SamMllmConfig) -> None:
        super().__init__(config)
        for part in (config.vision_config, config.qformer_config):
            if part._attn_implementation in ("flash_attention_2", "flex_attention"):
                # They take no mask like the Q-Former's, and the tower gains nothing from them over PyTorch's own.
                part._attn_implementation = "sdpa"
        self.vision_model = build_vision_model(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = InstructBlipQFormerModel._from_config(config.qformer_config)
        self.guidance = Guidance(config) if config.guidance_mode == "bidirectional" else None
        self.kernels: Backend = "auto"  # of this process, and no part of the configuration
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        check_language_model(self.language_model)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers' initialisers leave alone what was loaded from a checkpoint.
        if isinstance(module, SamMllmForConditionalGeneration):
            initialization.normal_(module.query_tokens, std=self.config.initializer_range)
        elif getattr(module, "is_zero_init", False):
            for parameter in module.parameters(recurse=False):
                initialization.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def train(self, mode: bool = True) -> "SamMllmForConditionalGeneration":
        """Train mode for the parts that train; frozen parts stay in eval, so that their dropout never acts."""
        super().train(mode)
        keep_frozen_parts_in_eval(self)
        return self

    def gradient_checkpointing_enable(  # type: ignore[override]
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute the layers of the language model, and of the vision tower where it trains, in the backward pass.

        Not those of the Q-Former: both streams need layer k after each other, and ZeRO-3 refuses a module that is
        called twice under checkpointing. They are small.
        """
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
        for layer in self.qformer.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = False
        self.train(self.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        labels: Tensor | None = None,
        num_label_tokens: int | None = None,
        pixel_values: Tensor | None = None,
        image_groups: ImageGroups | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        return_logits: bool | None = None,
        embeddings_only: bool = False,
        context_pixel_values: Tensor | None = None,
        use_context: bool = True,
    ) -> SamMllmOutput:
        """One call for all samples of a batch.

        Args:
            input_ids: packed [T] with cu_seqlens [S+1], or padded [B, T] with attention_mask [B, T] (default: ones).
                Every image has num_query_tokens places of image_token_id, in the order of pixel_values.
            position_ids: [T] or [B, T]; default: from cu_seqlens or attention_mask.
            max_seqlen, num_label_tokens: tokens of a pack's longest sample, and labels of a pack that count; without
                these numbers the host waits for the device to know them.
            labels: like input_ids, aligned with them; IGNORE_INDEX does not count.
            pixel_values: [I, 3, H, W]; I = 0 (or None) runs a dummy image that touches nothing.
            image_groups: which image belongs to which sample (or row); required where there are images.
            qformer_input_ids, qformer_attention_mask: [S, Tq], the instruction for the Q-Former.
            return_logits: default: only without labels. embeddings_only: stop before the language model.
            context_pixel_values: [I, 3, H, W], to measure what a context is worth: where an image would be read as the
                context of another, the one of the same place here is read. use_context: False leaves the context out.

        Raises:
            BatchError: padded rows whose image tokens do not fit their images, naming the row and both counts (a pack
                is checked on the host where it is made, by `PackedBatch.validate`); images and context_pixel_values
                differ in number.
        """
        is_packed = input_ids.ndim == 1
        if is_packed and cu_seqlens is None:
            raise BatchError("packed input_ids [T] need cu_seqlens [S+1]; padded ones have two dimensions [B, T]")
        columns, targets = (None, None) if labels is None else label_targets(_rows(labels), num_label_tokens)
        input_ids = _rows(input_ids)
        num_samples = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        num_images = 0 if pixel_values is None else pixel_values.shape[0]  # without the dummy
        if context_pixel_values is not None and context_pixel_values.shape[0] != num_images:
            raise BatchError(
                f"{num_images} images but {context_pixel_values.shape[0]} to be read as context in their places"
            )
        groups, pixel_values, qformer_input_ids, qformer_attention_mask = self._vision_inputs(
            num_samples, pixel_values, image_groups, qformer_input_ids, qformer_attention_mask
        )
        if not is_packed:
            self._check_image_tokens(input_ids, groups)
        query_outputs = self.encode_images(
            pixel_values, groups, qformer_input_ids, qformer_attention_mask,
            context_pixel_values=context_pixel_values if num_images else None, use_context=use_context,
        )  # fmt: skip
        inputs_embeds = self._embed(input_ids, self.language_projection(query_outputs), num_images=num_images)
        output = SamMllmOutput(query_outputs=query_outputs, inputs_embeds=inputs_embeds)
        if embeddings_only:
            return output

        attention = self._attention(input_ids, inputs_embeds.dtype, attention_mask, cu_seqlens, max_seqlen)
        if position_ids is None:
            if cu_seqlens is not None:
                position_ids = packed_positions(cu_seqlens, input_ids.shape[1])
            else:
                position_ids = padded_positions(_mask_or_ones(attention_mask, input_ids))
        if return_logits is None:
            return_logits = labels is None
        logits = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=_rows(position_ids),
            use_cache=False,
            logits_to_keep=0 if return_logits else columns,
            **attention,
        ).logits
        if return_logits:
            output.logits = logits
        if columns is not None and targets is not None:
            output.loss_sum = summed_loss(logits[:, columns] if return_logits else logits, targets)
            output.num_label_tokens = (targets != IGNORE_INDEX).sum()
            output.loss = output.loss_sum / output.num_label_tokens.clamp(min=1)
        return output

    def encode_images(
        self,
        pixel_values: Tensor,
        groups: ImageGroups,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor,
        *,
        context_pixel_values: Tensor | None = None,
        use_context: bool = True,
    ) -> Tensor:
        """Query outputs [I, Q, D] of images [I, 3, H, W], I >= 1, in one call of the tower and one of the Q-Former.

        Nothing is recorded for the backward pass below the first trainable parameter. `context_pixel_values` and
        `use_context` are those of `forward`; the former cost another call of the tower, so that the images' own
        features are the same to the last bit.
        """
        features = patch_features(self.vision_model, pixel_values)
        context_features = None
        if context_pixel_values is not None:
            context_features = patch_features(self.vision_model, context_pixel_values)
        return extract_visual_tokens(
            self.qformer,
            self.guidance,
            config=self.config,
            query_tokens=self.query_tokens,
            features=features,
            groups=groups,
            input_ids=qformer_input_ids,
            attention_mask=qformer_attention_mask,
            backend=self._backend(features.device),
            context_features=context_features,
            use_context=use_context,
        )

    def _backend(self, device: torch.device) -> ResolvedBackend:
        has_dropout = self.qformer.training and self.config.qformer_config.attention_probs_dropout_prob > 0
        if self.kernels != "auto" and not has_dropout:
            return self.kernels
        return choose_kernels(
            self.kernels, self.config.qformer_config, device_type=device.type, qformer_trains=self.qformer.training
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_groups: ImageGroups | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **generation: Any,
    ) -> Tensor:
        """New token ids [B, new] of a left-padded batch of prompts.

        Args:
            generation: keyword arguments of transformers' generate. A repetition penalty covers the new tokens only,
                as in the authors' release (their LLM is given embeddings too).
        """
        prefix = self(
            input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_groups=image_groups,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            embeddings_only=True,
        )
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(self.config, name) is not None:
                generation.setdefault(name, getattr(self.config, name))
        _penalise_repetition_alike(generation)
        return self.language_model.generate(
            inputs_embeds=prefix.inputs_embeds, attention_mask=_mask_or_ones(attention_mask, input_ids), **generation
        )

    def _vision_inputs(
        self,
        num_samples: int,
        pixel_values: Tensor | None,
        groups: ImageGroups | None,
        text_ids: Tensor | None,
        text_mask: Tensor | None,
    ) -> tuple[ImageGroups, Tensor, Tensor, Tensor]:
        """Images and texts for the Q-Former; where there are none, a dummy image of the first sample.

        The dummy's features reach no place of the text, so they add nothing, but every rank makes the same calls and
        every trainable parameter gets its (zero) gradient.
        """
        device = self.query_tokens.device
        if pixel_values is None or pixel_values.shape[0] == 0:
            size = getattr(self.config.vision_config, "image_size", None) or 224
            shape = (1, 3, *(size if isinstance(size, list | tuple) else (size, size)))
            pixel_values = torch.zeros(shape, device=device)
            groups = ImageGroups.of_one_image(num_samples, device=device)
        elif groups is None:
            raise BatchError(f"{pixel_values.shape[0]} images without image_groups: which sample has which images?")
        if text_ids is None or text_ids.shape[1] == 0:
            # One hidden token: without any, the Q-Former would skip its text layers, and other ranks would wait there.
            text_ids = torch.zeros(num_samples, 1, dtype=torch.int64, device=device)
            text_mask = torch.zeros_like(text_ids)
        elif text_mask is None:
            text_mask = torch.ones_like(text_ids)
        if text_ids.shape[0] != num_samples or groups.valid.shape[0] != num_samples:
            raise BatchError(
                f"{num_samples} samples, but {text_ids.shape[0]} Q-Former texts "
                f"and {groups.valid.shape[0]} image groups"
            )
        return groups.to(device), pixel_values, text_ids, text_mask

    def _check_image_tokens(self, input_ids: Tensor, groups: ImageGroups) -> None:
        found = self._is_image(input_ids).sum(1).tolist()
        images = groups.valid.sum(1).tolist()
        num_queries = self.config.num_query_tokens
        for row, (tokens, count) in enumerate(zip(found, images)):
            # The dummy image of a batch without images has no places.
            if tokens != count * num_queries and not (tokens == 0 and sum(found) == 0 and sum(images) == 1):
                raise BatchError(
                    f"row {row}: {tokens} image tokens but {count} images x {num_queries} query tokens = "
                    f"{count * num_queries}"
                )

    def _is_image(self, input_ids: Tensor) -> Tensor:
        if self.config.image_token_id is None:
            raise ConfigError("the model's config has no image_token_id; take it from its processor")
        return input_ids.eq(self.config.image_token_id)

    def _embed(self, input_ids: Tensor, visual_tokens: Tensor, *, num_images: int) -> Tensor:
        """[B, T, E]: text embeddings, image places filled with visual tokens [I, Q, E] in order.

        `num_images` of these have places: all, or none of the dummy's. There are as many places as their tokens, which
        is checked before, so nothing has to be counted on the device.
        """
        is_image = self._is_image(input_ids)
        # The image token may lie beyond the vocabulary (its embedding is never read), so another one stands in for it.
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        visual_tokens = visual_tokens[:num_images].flatten(0, 1).to(embeddings.dtype)  # [I * Q, E]
        # Not masked_scatter: its backward selects by mask, for which the host waits.
        places = is_image.flatten().nonzero_static(size=visual_tokens.shape[0])[:, 0]
        return embeddings.flatten(0, 1).index_copy(0, places, visual_tokens).view_as(embeddings)

    def _attention(
        self,
        input_ids: Tensor,
        dtype: torch.dtype,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> dict[str, Any]:
        if cu_seqlens is None:
            return {"attention_mask": _mask_or_ones(attention_mask, input_ids)}
        return packed_attention(
            cu_seqlens,
            max_seqlen=max_seqlen,
            num_tokens=input_ids.shape[1],
            dtype=dtype,
            attn_implementation=self.language_model.config._attn_implementation,
        )


def _penalise_repetition_alike(generation: dict[str, Any]) -> None:
    """Move `repetition_penalty` into a processor of its own, in place.

    transformers 5.23 exempts as many tokens from the penalty as a row has padding. With embeddings as the prompt these
    are the first *new* tokens, and a row's answer would depend on the longest prompt of its batch.
    """
    penalty = generation.pop("repetition_penalty", None)
    if penalty is not None and penalty != 1.0:
        own = RepetitionPenaltyLogitsProcessor(penalty=penalty)
        generation["logits_processor"] = LogitsProcessorList([own, *(generation.get("logits_processor") or [])])


def _rows(tensor: Tensor) -> Tensor:
    """A pack [T] as one row [1, T]; a padded batch as it is."""
    return tensor[None] if tensor.ndim == 1 else tensor


def _mask_or_ones(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask
