"""How the two streams of the Q-Former read images in a layer: the Q stream its own features F_i, the W stream C_i.

Both classes run one layer on rows of the Q stream, of the W stream, or of both (Q first), and compute the same:

    KernelContext        K(F), V(F) once per layer for both streams; the W stream mixes scores (samtrain_kernels)
    MaterialisedContext  C is built, and projected like an image; transformers' layer as it is, with dropout

Key and value projections are linear and the mixing weights sum to one, so K(C_i) = sum_j a_ij K(F_j), bias included.
With an order embedding o_j the W stream reads F_j + o_j: K(F_j + o_j) = K(F_j) + (K(o_j) - K(0)), a bias per image.

Legend: I images, S samples, N most images of a sample, P patches, C width of the features, D width of the Q-Former,
H heads, Q query tokens, L = Q + text tokens, K contexts: I with `others`, S with `all`; R rows of hidden states.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import torch
from samtrain_kernels import context_attention, mix_images
from samtrain_kernels.tables import Context
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.instructblip.modeling_instructblip import eager_attention_forward

from samtrain.core.batch import ImageGroups

RunLayer = Callable[[Tensor, Tensor, int], Tensor]
"""(hidden [R, L, D], additive mask [R, 1, 1, L], how many of the rows are the Q stream's) -> hidden [R, L, D]."""


class StreamReader(Protocol):
    """What the streams read, for all layers."""

    def at(self, layer: Any) -> RunLayer:
        """The layer, ready to run on either stream or both; what they share in it is computed here, once."""

    def unshare(self) -> None:
        """From here on the W stream has a row for every image, with `all` too, where it had one for every sample."""


class MaterialisedContext:
    """Contextual features, read like an image's own.

    Args:
        features: F, [I, P, C]. order: [I, C], what the W stream reads beside F, or None.
        weights: a, [K, N, P], from `samtrain_kernels.image_mix_weights`.
        context_features: [I, P, C], what the W stream reads in place of F; None: F.
    """

    def __init__(
        self,
        features: Tensor,
        weights: Tensor,
        order: Tensor | None,
        groups: ImageGroups,
        *,
        context: Context,
        num_queries: int,
        context_features: Tensor | None = None,
    ) -> None:
        read = features if context_features is None else context_features
        read = read if order is None else read + order[:, None]
        self.features = features
        self.contextual = mix_images(read, weights, groups, context=context)  # C, [K, P, C]
        self.joint: Tensor | None = None  # both, once a layer asks for them
        self.groups, self.num_queries = groups, num_queries

    def unshare(self) -> None:
        self.contextual, self.joint = self.contextual[self.groups.group_of_image], None

    def at(self, layer: Any) -> RunLayer:
        return partial(self._run, layer)

    def _run(self, layer: Any, hidden: Tensor, mask: Tensor, num_q_rows: int) -> Tensor:
        return layer(hidden, mask, self._images(hidden.shape[0], num_q_rows), query_length=self.num_queries)

    def _images(self, num_rows: int, num_q_rows: int) -> Tensor:
        if num_q_rows == 0:
            return self.contextual
        if num_q_rows == num_rows:
            return self.features
        if self.joint is None:
            self.joint = torch.cat([self.features, self.contextual])
        return self.joint


class KernelContext:
    """Keys and values of the raw features, shared by both streams; no contextual feature is ever built.

    Only modules are called, never their weights read: ZeRO-3 gathers a parameter when its module is called.

    Args:
        as `MaterialisedContext`; backend: how `context_attention` runs.
    """

    def __init__(
        self,
        features: Tensor,
        weights: Tensor,
        order: Tensor | None,
        groups: ImageGroups,
        *,
        context: Context,
        num_queries: int,
        backend: Literal["triton", "reference"],
        context_features: Tensor | None = None,
    ) -> None:
        self.features, self.weights, self.order, self.groups = features, weights, order, groups
        self.context_features = context_features
        self.context, self.num_queries, self.backend = context, num_queries, backend
        self.is_shared = context == "all"

    def unshare(self) -> None:
        self.is_shared = False

    def at(self, layer: Any) -> RunLayer:
        if not layer.has_cross_attention:
            return partial(self._run, layer, None)
        attention = layer.crossattention.attention
        own = _keys_values(attention, self.features)
        of_context = own if self.context_features is None else _keys_values(attention, self.context_features)
        biases: list[Tensor | None] = [None, None]
        if self.order is not None:
            biases = [
                _shift(linear, self.order).unflatten(-1, (attention.num_attention_heads, -1))  # [I, H, D/H]
                for linear in (attention.key, attention.value)
            ]
        return partial(self._run, layer, (*own, *of_context, *biases))

    def _run(
        self, layer: Any, keys_values: tuple[Tensor | None, ...] | None, hidden: Tensor, mask: Tensor, num_q_rows: int
    ) -> Tensor:
        """transformers' InstructBlipQFormerLayer, but for the attention to images."""
        if keys_values is None:
            return layer(hidden, mask, query_length=self.num_queries)
        hidden = layer.attention(hidden, mask)
        queries, text = hidden[:, : self.num_queries], hidden[:, self.num_queries :]
        cross = layer.crossattention
        query = cross.attention.query(queries).unflatten(-1, (cross.attention.num_attention_heads, -1))
        attended = self._attend(cross.attention, query, keys_values, num_q_rows)
        queries = cross.output(attended.flatten(2), queries)
        return torch.cat([layer.feed_forward_chunk_query(queries), layer.feed_forward_chunk(text)], dim=1)

    def _attend(self, attention: Any, query: Tensor, keys_values: Any, num_q_rows: int) -> Tensor:
        """[R, Q, H, D/H] -> the same: the first rows to their own images, the others to their contexts."""
        key, value, context_key, context_value, key_bias, value_bias = keys_values
        of_q, of_w = query.tensor_split([num_q_rows])
        attended = []
        if of_q.shape[0]:
            own = (x.transpose(1, 2) for x in (of_q, key, value))  # [I, H, Q or P, D/H]
            # The user's choice of attention, as in transformers' layer: no one of them is fastest everywhere.
            ordinary = ALL_ATTENTION_FUNCTIONS.get_interface(
                attention.config._attn_implementation, eager_attention_forward
            )
            attended.append(ordinary(attention, *own, None, dropout=0.0, scaling=attention.scaling)[0])
        if of_w.shape[0]:
            mixed = context_attention(
                of_w, context_key, context_value, self.weights, self.groups, context=self.context,
                queries="group" if self.is_shared else "image", key_bias=key_bias, value_bias=value_bias,
                scale=attention.scaling, backend=self.backend,
            )  # fmt: skip
            attended.append(mixed)
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def _keys_values(attention: Any, features: Tensor) -> list[Tensor]:
    """Two of [I, P, H, D/H]."""
    return [
        linear(features).unflatten(-1, (attention.num_attention_heads, -1))
        for linear in (attention.key, attention.value)
    ]


def _shift(linear: nn.Module, order: Tensor) -> Tensor:
    """How an addition of `order` [I, C] to the input moves the output: W o, [I, D], without the layer's bias."""
    output = linear(torch.cat([order, order.new_zeros(1, order.shape[1])]))
    return output[:-1] - output[-1]
