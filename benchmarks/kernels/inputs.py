"""Random data of a level, with everything that exists before it is called.

Legend: I images, S samples, N images of a sample, P patches, C feature width, H heads, D head width, Q queries,
K contexts (I with `others`, S with `all`).

Data is normal, never zero: a GPU draws less power, and runs faster, on zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from samtrain_kernels import image_mix_weights, mix_images
from torch import Tensor

from benchmarks.kernels.shapes import Context, Shape
from samtrain.core.batch import ImageGroups

OursBackend = Literal["triton", "reference"]
SlotIndex = Tensor | slice


@dataclass(frozen=True)
class SlotTables:
    """For the loop over images: which images and samples stand at each place 0..N-1, and how to undo that order.

    images[j], samples[j]: a slice where all samples are alike (a view, as in a 5-D batch), else int64 indices.
    order: [I] int64, from the concatenation over places back to image order.
    """

    images: tuple[SlotIndex, ...]
    samples: tuple[SlotIndex, ...]
    order: Tensor


Tables = tuple[ImageGroups, SlotTables]


@dataclass(frozen=True)
class CrossInputs:
    """Tensors of the levels mix, op and cross.

    features: F, [I, P, C]. score_weight: [C] float32. query: [I, Q, H, D], of the Q stream.
    context_query: [K, Q, H, D], of the W stream. kv_weight: [2HD, C], kv_bias: [2HD].
    weights: a, [K, N, P] float32; contextual: C, [K, P, C]; key_value: [I, P, 2, H, D], packed.
    backend: how our operations run.
    """

    shape: Shape
    context: Context
    trained: bool
    backend: OursBackend
    groups: ImageGroups
    slots: SlotTables
    features: Tensor
    score_weight: Tensor
    query: Tensor
    context_query: Tensor
    kv_weight: Tensor
    kv_bias: Tensor
    weights: Tensor
    contextual: Tensor
    key_value: Tensor

    def leaves(self) -> list[Tensor]:
        """What gradients are accumulated into."""
        return [t for t in self._tensors() if t.is_leaf and t.requires_grad]

    def num_bytes(self) -> int:
        """Of all tensors: what a rotation over input sets walks through."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return (value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor))


def draw_cross(
    shape: Shape,
    context: Context,
    *,
    trained: bool,
    device: torch.device,
    dtype: torch.dtype,
    backend: OursBackend,
    seed: int = 0,
    logit_sd: float = 1.0,
    tables: Tables | None = None,
) -> CrossInputs:
    """Independent random tensors; what is derived is not there yet (`derive`).

    Keys, values and features have unit variance; attention logits and patch logits have standard deviation `logit_sd`.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, sd: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        drawn = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return (drawn * sd).to(dtype)

    width, c = shape.width, shape.feature_width
    per_image = (shape.queries, shape.heads, shape.head_dim)
    none = torch.empty(0, device=device)
    groups, slots = tables or build_tables(shape, device)
    return CrossInputs(
        shape=shape,
        context=context,
        trained=trained,
        backend=backend,
        groups=groups,
        slots=slots,
        features=normal(shape.images, shape.patches, c),
        score_weight=normal(c, sd=logit_sd * c**-0.5, dtype=torch.promote_types(dtype, torch.float32)),
        query=normal(shape.images, *per_image, sd=logit_sd),
        context_query=normal(shape.contexts(context), *per_image, sd=logit_sd),
        kv_weight=normal(2 * width, c, sd=c**-0.5),
        kv_bias=normal(2 * width, sd=0.1),
        weights=none,
        contextual=none,
        key_value=none,
    )


def derive(inputs: CrossInputs, *, chained: bool) -> CrossInputs:
    """Mixing weights, contextual features, keys and values; and what needs a gradient.

    Args:
        chained: True: they stay in the graph of score_weight, kv_weight and kv_bias, so that every implementation's
            gradients end at the same leaves and can be compared. False: each is a leaf of its own, so that a level's
            time holds nothing of what came before it.
    """
    if chained:
        leaf_names = ["score_weight", "context_query"] + ["query", "kv_weight", "kv_bias"] * inputs.trained
        leaves = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in leaf_names}
        inputs = replace(inputs, **leaves)
    weights = image_mix_weights(inputs.features, inputs.score_weight, None, inputs.groups, context=inputs.context)
    contextual = mix_images(inputs.features, weights, inputs.groups, context=inputs.context)
    key_value = project(inputs, inputs.features)
    if chained:
        return replace(inputs, weights=weights, contextual=contextual, key_value=key_value)

    def leaf(x: Tensor, needs_gradient: bool) -> Tensor:
        return x.detach().clone().requires_grad_(needs_gradient)

    return replace(
        inputs,
        score_weight=leaf(inputs.score_weight, True),
        context_query=leaf(inputs.context_query, True),
        query=leaf(inputs.query, inputs.trained),
        kv_weight=leaf(inputs.kv_weight, inputs.trained),
        kv_bias=leaf(inputs.kv_bias, inputs.trained),
        weights=leaf(weights, True),
        contextual=leaf(contextual, True),
        key_value=leaf(key_value, inputs.trained),
    )


def project(inputs: CrossInputs, features: Tensor) -> Tensor:
    """Keys and values of a layer by one matmul: [R, P, C] -> [R, P, 2, H, D]."""
    shape = inputs.shape
    weight, bias = inputs.kv_weight.to(features.dtype), inputs.kv_bias.to(features.dtype)
    flat = torch.nn.functional.linear(features, weight, bias)
    return flat.unflatten(-1, (2, shape.heads, shape.head_dim))


def in_precision(inputs: CrossInputs, dtype: torch.dtype, *, weights_only: bool = False) -> CrossInputs:
    """The same values in another dtype; `weights_only`: of the linear layer alone (a float32 model under autocast)."""
    names = ["kv_weight", "kv_bias"]
    if not weights_only:
        names += ["features", "query", "context_query", "score_weight"]
    return replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in names})


def build_tables(shape: Shape, device: torch.device) -> Tables:
    return ImageGroups.from_counts(list(shape.counts)).to(device), _slot_tables(shape, device)


def _slot_tables(shape: Shape, device: torch.device) -> SlotTables:
    counts = shape.counts
    starts = [sum(counts[:s]) for s in range(len(counts))]
    images: list[Any] = []
    samples: list[Any] = []
    flat: list[int] = []
    for j in range(max(counts)):
        members = [s for s, n in enumerate(counts) if n > j]
        places = [starts[s] + j for s in members]
        flat += places
        if len(set(counts)) == 1:
            images.append(slice(j, None, counts[0]))
            samples.append(slice(None))
        else:
            images.append(torch.tensor(places, device=device))
            samples.append(torch.tensor(members, device=device))
    order = torch.tensor(sorted(range(len(flat)), key=flat.__getitem__), device=device)
    return SlotTables(tuple(images), tuple(samples), order)
