"""Bidirectional semantic guidance: the two-stream Q-Former of SAM (arXiv 2408.12867, section 3; method.md section 1).

The Q stream extracts visual tokens from each image. The W stream (the paper's W-Former) is a second pass of the SAME
layers over contextual features C_i, a patch-wise mix of the other images of the sample (`others`), of all of them
(`all`), or the image alone (`own`, the matched control). They meet at two layers:

    q, w = x0, x0
    for t in 1..L:
        if t == l: w = w + A(q)        # initial visual tokens steer what the W-Former reads
        w_next = layer_t(w, kv=C_i)
        if t == k: q = q + B(w_next)   # contextual semantics guide the extraction
        q = layer_t(q, kv=F_i)
        w = w_next                     # never read after k: skipped

A and B start at zero, so before training the result is InstructBLIP's. All images of a batch go through in one call:
there is no loop over images or samples.

Legend: I images, S samples, N most images of a sample, P patches, C width of the vision features, D width of the
Q-Former, Q query tokens, Tq text tokens, R rows of the W stream (I, or S while all images of a sample share it).
"""

from typing import Literal, cast

import torch
from samtrain_kernels import image_mix_weights
from samtrain_kernels.dispatch import ResolvedBackend
from samtrain_kernels.tables import Context
from torch import Tensor, nn
from transformers import InstructBlipQFormerModel

from samtrain.core.batch import ImageGroups
from samtrain.core.errors import BatchError
from samtrain.model.configuration import SamMllmConfig
from samtrain.model.streams import KernelContext, MaterialisedContext, StreamReader


class PatchScore(nn.Linear):
    """The adaptive adjustment, Linear(C, 1). Its forward calls the kernel, so that ZeRO-3 gathers the weight first."""

    def forward(  # type: ignore[override]
        self,
        features: Tensor,
        order: Tensor | None,
        groups: ImageGroups,
        *,
        context: Context,
        backend: Literal["triton", "reference"],
    ) -> Tensor:
        """Weights of the images in every context, [K, N, P] float32, from F [I, P, C] and what is added to it, [I, C].

        The score of F_j + o_j is that of F_j plus w . o_j, so the sum is never built.
        """
        weight, logit_bias = self.weight[0], None
        if order is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            logit_bias = (order.to(wide) * weight.to(wide)).sum(-1)
        return image_mix_weights(
            features, weight, self.bias, groups, context=context, logit_bias=logit_bias, backend=backend
        )


class Guidance(nn.Module):
    """The parameters of guidance: A, B, the adaptive adjustment, and (ours, not the paper's) the order embedding.

    With the paper's widths (D 768, C 1408): 1,182,593 parameters.
    """

    def __init__(self, config: SamMllmConfig) -> None:
        super().__init__()
        width, feature_width = config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size
        self.context = config.guidance_context
        self.max_images = config.max_images
        self.initial_projection = nn.Linear(width, width)  # A
        self.context_projection = nn.Linear(width, width)  # B
        self.patch_score = PatchScore(feature_width, 1)
        # Behind a module call, so that ZeRO-3 gathers it.
        self.order_embedding = nn.Embedding(config.max_images, feature_width) if config.order_embedding else None
        for module in (self.initial_projection, self.context_projection, self.order_embedding):
            if module is not None:
                module.is_zero_init = True  # type: ignore[assignment]  # read by the model's _init_weights

    def reader(
        self,
        features: Tensor,
        groups: ImageGroups,
        *,
        num_queries: int,
        backend: ResolvedBackend,
        context_features: Tensor | None = None,
    ) -> StreamReader:
        """What both streams read, from the features F [I, P, C]; `context_features`: as of `extract_visual_tokens`.

        Raises:
            BatchError: a sample has more images than the order embedding has rows.
        """
        order = self._order(groups)
        context, groups = self._mixed(groups)
        mixing: Literal["triton", "reference"] = "triton" if backend == "triton" else "reference"
        scored = features if context_features is None else context_features
        weights = self.patch_score(scored, order, groups, context=context, backend=mixing)
        if backend == "materialised":
            return MaterialisedContext(
                features, weights, order, groups, context=context, num_queries=num_queries,
                context_features=context_features,
            )  # fmt: skip
        return KernelContext(
            features, weights, order, groups, context=context, num_queries=num_queries,
            backend=backend, context_features=context_features,
        )  # fmt: skip

    def _mixed(self, groups: ImageGroups) -> tuple[Context, ImageGroups]:
        """What the kernels mix, and among whom: an image's own context is `all` of a sample without others.

        The softmax over one image is 1: the adaptive adjustment runs as elsewhere, and its gradient is zero. The W
        stream has a row for every image all along, which is one for every sample of these tables.
        """
        if self.context == "own":
            return "all", groups.each_alone()
        return cast(Context, self.context), groups

    def _order(self, groups: ImageGroups) -> Tensor | None:
        """[I, C]: the order embedding of every image; None without one."""
        if self.order_embedding is None:
            return None
        if groups.valid.shape[1] > self.max_images:
            raise BatchError(
                f"a sample has {groups.valid.shape[1]} images, the order embedding {self.max_images} rows; "
                "raise model.guidance.max_images"
            )
        return self.order_embedding(groups.slot_of_image)


def extract_visual_tokens(
    qformer: InstructBlipQFormerModel,
    guidance: Guidance | None,
    *,
    config: SamMllmConfig,
    query_tokens: Tensor,
    features: Tensor,
    groups: ImageGroups,
    input_ids: Tensor,
    attention_mask: Tensor,
    backend: ResolvedBackend,
    context_features: Tensor | None = None,
    use_context: bool = True,
) -> Tensor:
    """Query outputs of every image, guided by the other images of its sample (`guidance=None`: each image alone).

    Which layers are called, and how often, depends on the configuration and on what trains, never on the batch: under
    ZeRO-3 every rank must make the same calls.

    Args:
        qformer: its embeddings and layers are called directly.
        query_tokens: [1, Q, D]. features: F, [I, P, C], I >= 1.
        input_ids, attention_mask: [S, Tq] int64, the instruction; Tq >= 1.
        backend: how the W stream reads its context (`streams.py`); without guidance nobody asks.
        context_features: [I, P, C], to measure what a context is worth: the W stream reads row j where it would read
            F_j, the Q stream F as ever. Without guidance nobody asks.
        use_context: False leaves c_i out, by the same computation, so that the difference is that of c_i alone.

    Returns:
        [I, Q, D].
    """
    num_queries, of_image = query_tokens.shape[1], groups.group_of_image
    start = qformer.embeddings(
        input_ids=input_ids, query_embeds=query_tokens.expand(input_ids.shape[0], -1, -1)
    )  # [S, Q+Tq, D]
    mask = _additive_mask(attention_mask, num_queries, dtype=start.dtype)  # [S, 1, 1, Q+Tq]
    q, q_mask = start[of_image], mask[of_image]
    layers = qformer.encoder.layer
    if guidance is None:
        for layer in layers:
            q = layer(q, q_mask, features, query_length=num_queries)
        return q[:, :num_queries]

    reader = guidance.reader(
        features, groups, num_queries=num_queries, backend=backend, context_features=context_features
    )
    # With `all`, C is the same for every image of a sample, and so is the W stream until A steers it at layer l.
    is_shared = guidance.context == "all"
    w, w_mask = (start, mask) if is_shared else (q, q_mask)
    has_context = _has_context(groups, guidance.context)
    if not use_context:
        has_context = torch.zeros_like(has_context)
    # One call per layer for both streams, unless only one of them needs a backward pass: a frozen Q-Former without
    # anything trainable below it gives a Q stream that autograd does not record before layer k.
    q_records = torch.is_grad_enabled() and (q.requires_grad or features.requires_grad or _trains(qformer))
    w_records = torch.is_grad_enabled() and (q_records or _trains(guidance))
    for t, layer in enumerate(layers[: config.contextual_layer], start=1):
        if t == config.initial_layer:
            if is_shared:
                reader.unshare()
                w, w_mask = w[of_image], q_mask
            w = w + guidance.initial_projection(q)
        run = reader.at(layer)
        if t < config.contextual_layer and q_records == w_records:
            both = run(torch.cat([q, w]), torch.cat([q_mask, w_mask]), q.shape[0])
            q, w = both.split([q.shape[0], w.shape[0]])
            continue
        w = run(w, w_mask, 0)
        if t == config.contextual_layer:
            q = q + guidance.context_projection(w).masked_fill(~has_context, 0.0)
        q = run(q, q_mask, q.shape[0])
    for layer in layers[config.contextual_layer :]:
        q = layer(q, q_mask, features, query_length=num_queries)
    return q[:, :num_queries]


def _has_context(groups: ImageGroups, context: str) -> Tensor:
    """[I, 1, 1] bool: False for the only image of a sample with `others`, where guidance is off."""
    enough = 2 if context == "others" else 1
    return (groups.valid.sum(1) >= enough)[groups.group_of_image][:, None, None]


def _additive_mask(attention_mask: Tensor, num_queries: int, *, dtype: torch.dtype) -> Tensor:
    """[S, 1, 1, Q+Tq], 0 where a position may be read and the lowest finite number where it may not."""
    visible = torch.nn.functional.pad(attention_mask.bool(), (num_queries, 0), value=True)
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None, None, :]


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
