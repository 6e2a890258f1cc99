"""The whole two-stream Q-Former, every way we know to run it: level qformer.

All run transformers' own layers with the same weights, so they differ in structure and cross-attention alone:

    loop     one image at a time, one stream at a time, as the authors' code does
    plain    all images and both streams in one call, a W row for every image, everything recorded by autograd
    shared   the structure of samtrain/model/guidance.py: one W row per sample up to layer l with `all`, and a frozen
             Q stream that autograd does not record. "Ours" runs that very function.

Legend: I images, S samples, P patches, C feature width, D width of the Q-Former, Q query tokens, L = Q + text tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from samtrain_kernels import image_mix_weights, mix_images
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from benchmarks.kernels.implementations import Attention, Outputs, sdpa
from benchmarks.kernels.inputs import OursBackend, SlotTables, Tables, build_tables
from benchmarks.kernels.shapes import Context, Shape
from samtrain.core.batch import ImageGroups
from samtrain.model.configuration import SamMllmConfig
from samtrain.model.guidance import Guidance, extract_visual_tokens
from samtrain.model.streams import KernelContext, MaterialisedContext, RunLayer, StreamReader

VOCABULARY = 1000  # of the random text; the embedding's size changes nothing that is measured


@dataclass(frozen=True)
class QformerInputs:
    """Model and batch of the level.

    features: F, [I, P, C]. query_tokens: [1, Q, D]. input_ids, attention_mask: [S, Tq].
    model: qformer and guidance, in eval mode (dropout would send ours to the materialised path).
    """

    shape: Shape
    context: Context
    trained: bool
    backend: OursBackend
    model: nn.ModuleDict
    config: SamMllmConfig
    groups: ImageGroups
    slots: SlotTables
    features: Tensor
    query_tokens: Tensor
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def qformer(self) -> InstructBlipQFormerModel:
        module = self.model["qformer"]
        assert isinstance(module, InstructBlipQFormerModel)
        return module

    @property
    def guidance(self) -> Guidance:
        module = self.model["guidance"]
        assert isinstance(module, Guidance)
        return module

    def leaves(self) -> list[Tensor]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return parameters + [self.query_tokens] * self.query_tokens.requires_grad

    def num_bytes(self) -> int:
        return self.features.numel() * self.features.element_size()


def draw_qformer(
    shape: Shape,
    context: Context,
    *,
    trained: bool,
    device: torch.device,
    dtype: torch.dtype,
    backend: OursBackend,
    seed: int = 0,
    logit_sd: float = 1.0,
    attention: str = "sdpa",
    model: nn.ModuleDict | None = None,
    tables: Tables | None = None,
    weights_in: torch.dtype | None = None,
    features_in: torch.dtype | None = None,
) -> QformerInputs:
    """A batch, and the model it runs on. A and B are random, not zero, so that all of it carries gradients.

    Args:
        model: that of an earlier batch, in the precision it has.
        dtype: what all values are rounded to. weights_in, features_in: what they are widened to then.
    """
    generator = torch.Generator(device).manual_seed(seed)
    config = qformer_configuration(shape, context, attention)
    if model is None:
        model = _cast(_cast(build_model(config, device, logit_sd=logit_sd), dtype), weights_in or dtype)
        model["qformer"].requires_grad_(trained)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    text = (shape.groups, shape.text_tokens)
    groups, slots = tables or build_tables(shape, device)
    return QformerInputs(
        shape=shape,
        context=context,
        trained=trained,
        backend=backend,
        model=model,
        config=config,
        groups=groups,
        slots=slots,
        features=normal(shape.images, shape.patches, shape.feature_width).to(features_in or dtype),
        query_tokens=(normal(1, shape.queries, shape.width) * 0.5).to(weights_in or dtype).requires_grad_(trained),
        input_ids=torch.randint(VOCABULARY, text, generator=generator, device=device),
        attention_mask=torch.ones(text, dtype=torch.int64, device=device),
    )


def qformer_configuration(shape: Shape, context: Context, attention: str) -> SamMllmConfig:
    qformer = InstructBlipQFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        encoder_hidden_size=shape.feature_width,
        cross_attention_frequency=shape.cross_frequency,
        max_position_embeddings=max(512, shape.text_tokens),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    qformer._attn_implementation = attention
    config = SamMllmConfig(
        qformer_config=qformer,
        num_query_tokens=shape.queries,
        guidance_context=context,
        initial_layer=shape.initial_layer,
        contextual_layer=shape.contextual_layer,
    )
    config.qformer_config._attn_implementation = attention
    return config


def build_model(config: SamMllmConfig, device: torch.device, *, logit_sd: float) -> nn.ModuleDict:
    """Q-Former and guidance with random weights, always the same, in float32."""
    generator = torch.Generator(device).manual_seed(1)
    with torch.device(device):
        model = nn.ModuleDict(
            {"qformer": InstructBlipQFormerModel(config.qformer_config), "guidance": Guidance(config)}
        )
    width, feature_width = config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)  # unit variance through a layer at any width
            else:
                parameter.copy_(noise * 0.1 + name.lower().endswith("layernorm.weight"))
        score: Any = model["guidance"].patch_score
        sd = logit_sd * feature_width**-0.5
        score.weight.copy_(torch.randn(1, feature_width, generator=generator, device=device) * sd)
        for name in ("initial_projection", "context_projection"):
            weight = getattr(model["guidance"], name).weight
            weight.copy_(torch.randn(width, width, generator=generator, device=device) * 0.5 * width**-0.5)
    return model.eval()


def _cast(model: nn.ModuleDict, dtype: torch.dtype) -> nn.ModuleDict:
    """`model.to(dtype)`, which cannot replace parameters of fake tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    return model


def loop(inputs: QformerInputs) -> Outputs:
    """The reference's way: N pairs of passes."""
    outputs, contextual = [], _contextual(inputs)
    for j in range(inputs.shape.most_images):
        images, samples = inputs.slots.images[j], inputs.slots.samples[j]
        of_context = contextual[images] if inputs.context == "others" else contextual[samples]
        start, mask = embed(inputs, samples)
        outputs.append(_one_image(inputs, start, mask, inputs.features[images], of_context))
    return (torch.cat(outputs)[inputs.slots.order],)


def _contextual(inputs: QformerInputs) -> Tensor:
    weight = inputs.guidance.patch_score.weight[0]
    weights = image_mix_weights(inputs.features, weight, None, inputs.groups, context=inputs.context)
    return mix_images(inputs.features, weights, inputs.groups, context=inputs.context)


def _one_image(inputs: QformerInputs, start: Tensor, mask: Tensor, features: Tensor, contextual: Tensor) -> Tensor:
    config, guidance, q, w = inputs.config, inputs.guidance, start, start
    for t, layer in enumerate(inputs.qformer.encoder.layer, start=1):
        if t <= config.contextual_layer:
            if t == config.initial_layer:
                w = w + guidance.initial_projection(q)
            w = layer(w, mask, contextual, query_length=inputs.shape.queries)
            if t == config.contextual_layer:
                q = q + guidance.context_projection(w)
        q = layer(q, mask, features, query_length=inputs.shape.queries)
    return q[:, : inputs.shape.queries]


def embed(inputs: QformerInputs, samples: Any) -> tuple[Tensor, Tensor]:
    """[rows, L, D] and the additive mask [rows, 1, 1, L] of some samples."""
    ids = inputs.input_ids[samples]
    start = inputs.qformer.embeddings(input_ids=ids, query_embeds=inputs.query_tokens.expand(ids.shape[0], -1, -1))
    visible = torch.nn.functional.pad(inputs.attention_mask[samples].bool(), (inputs.shape.queries, 0), value=True)
    mask = torch.zeros_like(visible, dtype=start.dtype).masked_fill(~visible, torch.finfo(start.dtype).min)
    return start, mask[:, None, None, :]


def plain(inputs: QformerInputs, make_reader: Callable[[QformerInputs], StreamReader]) -> Outputs:
    """Batched, and nothing more: a W row for every image, both streams recorded."""
    return (_two_streams(inputs, make_reader(inputs), is_shared=False, is_split=False),)


def shared(inputs: QformerInputs, make_reader: Callable[[QformerInputs], StreamReader]) -> Outputs:
    """The structure of ours, for any cross-attention."""
    is_shared = inputs.context == "all"
    return (_two_streams(inputs, make_reader(inputs), is_shared=is_shared, is_split=not inputs.trained),)


def ours(inputs: QformerInputs) -> Outputs:
    """What the model runs."""
    return (_extract(inputs, inputs.backend),)


def ours_materialised(inputs: QformerInputs) -> Outputs:
    """What the model runs with `kernels: materialised`."""
    return (_extract(inputs, "materialised"),)


def ours_unshared(inputs: QformerInputs) -> Outputs:
    """Our kernels without the shared W stream: with `all` a W row for every image from the first layer on."""
    return (_two_streams(inputs, kernel_reader(inputs), is_shared=False, is_split=not inputs.trained),)


def _extract(inputs: QformerInputs, backend: Any) -> Tensor:
    return extract_visual_tokens(
        inputs.qformer,
        inputs.guidance,
        config=inputs.config,
        query_tokens=inputs.query_tokens,
        features=inputs.features,
        groups=inputs.groups,
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        backend=backend,
    )


def _two_streams(inputs: QformerInputs, reader: StreamReader, *, is_shared: bool, is_split: bool) -> Tensor:
    """The loop over layers of guidance.py with both decisions as arguments (a test holds the two together)."""
    config, guidance = inputs.config, inputs.guidance
    of_image = inputs.groups.group_of_image
    start, mask = embed(inputs, slice(None))
    q, q_mask = start[of_image], mask[of_image]
    w, w_mask = (start, mask) if is_shared else (q, q_mask)
    if inputs.context == "all" and not is_shared:
        reader.unshare()
    for t, layer in enumerate(inputs.qformer.encoder.layer[: config.contextual_layer], start=1):
        if t == config.initial_layer:
            if is_shared:
                reader.unshare()
                w, w_mask = w[of_image], q_mask
            w = w + guidance.initial_projection(q)
        run = reader.at(layer)
        if t < config.contextual_layer and not is_split:
            both = run(torch.cat([q, w]), torch.cat([q_mask, w_mask]), q.shape[0])
            q, w = both.split([q.shape[0], w.shape[0]])
            continue
        w = run(w, w_mask, 0)
        if t == config.contextual_layer:
            q = q + guidance.context_projection(w)
        q = run(q, q_mask, q.shape[0])
    for layer in inputs.qformer.encoder.layer[config.contextual_layer :]:
        q = layer(q, q_mask, inputs.features, query_length=inputs.shape.queries)
    return q[:, : inputs.shape.queries]


def kernel_reader(inputs: QformerInputs) -> StreamReader:
    return KernelContext(*_reader_arguments(inputs), **_reader_options(inputs), backend=inputs.backend)


def materialised_reader(inputs: QformerInputs) -> StreamReader:
    """transformers' layers as they are; their configuration chooses eager or SDPA."""
    return MaterialisedContext(*_reader_arguments(inputs), **_reader_options(inputs))


class LibraryContext:
    """Keys and values of the contexts, projected from contextual features or mixed from the images', read by a
    library's attention."""

    def __init__(self, inputs: QformerInputs, *, is_mixed: bool, attention: Attention) -> None:
        self.features, self.weights, _, self.groups = _reader_arguments(inputs)
        self.context, self.num_queries, self.attention = inputs.context, inputs.shape.queries, attention
        self.contextual = None if is_mixed else _contextual(inputs)
        self.is_shared = inputs.context == "all"

    def unshare(self) -> None:
        self.is_shared = False

    def at(self, layer: Any) -> RunLayer:
        if not layer.has_cross_attention:
            return lambda hidden, mask, _: layer(hidden, mask, query_length=self.num_queries)
        own = self._project(layer, self.features)
        if self.contextual is None:
            read = [mix_images(x, self.weights, self.groups, context=self.context) for x in own]
        else:
            read = self._project(layer, self.contextual)
        if self.context == "all" and not self.is_shared:
            read = [x[self.groups.group_of_image] for x in read]
        return functools.partial(self._run, layer, own, read)

    def _project(self, layer: Any, features: Tensor) -> list[Tensor]:
        attention = layer.crossattention.attention
        heads = (attention.num_attention_heads, -1)
        return [linear(features).unflatten(-1, heads) for linear in (attention.key, attention.value)]

    def _run(
        self, layer: Any, own: list[Tensor], read: list[Tensor], hidden: Tensor, mask: Tensor, num_q_rows: int
    ) -> Tensor:
        """transformers' InstructBlipQFormerLayer, but for the attention to images."""
        hidden = layer.attention(hidden, mask)
        queries, text = hidden[:, : self.num_queries], hidden[:, self.num_queries :]
        cross = layer.crossattention
        query = cross.attention.query(queries).unflatten(-1, (cross.attention.num_attention_heads, -1))
        of_q, of_w = query.tensor_split([num_q_rows])
        attended = [self.attention(x, *kv) for x, kv in ((of_q, own), (of_w, read)) if x.shape[0]]
        queries = cross.output((attended[0] if len(attended) == 1 else torch.cat(attended)).flatten(2), queries)
        return torch.cat([layer.feed_forward_chunk_query(queries), layer.feed_forward_chunk(text)], dim=1)


def library_reader(*, is_mixed: bool = False, attention: Attention = sdpa) -> Callable[[QformerInputs], StreamReader]:
    return lambda inputs: LibraryContext(inputs, is_mixed=is_mixed, attention=attention)


def _reader_arguments(inputs: QformerInputs) -> tuple[Any, ...]:
    score = inputs.guidance.patch_score
    weights = image_mix_weights(inputs.features, score.weight[0], score.bias, inputs.groups, context=inputs.context)
    return inputs.features, weights, None, inputs.groups


def _reader_options(inputs: QformerInputs) -> dict[str, Any]:
    return {"context": inputs.context, "num_queries": inputs.shape.queries}
