"""Cross-attention of one layer, every way we know to do it: levels mix, op and cross.

Every function takes `CrossInputs` and returns the outputs of its level: (weights,) | (W,) | (Q, W).

Legend: I images, S samples, N images of a sample, P patches, C feature width, H heads, D head width, Q queries,
K contexts (I with `others`, S with `all`), R rows (I or K).
"""

from collections.abc import Callable

import torch
from samtrain_kernels import context_attention, image_mix_weights, mix_images
from samtrain_kernels.image_mix.reference import masked_softmax_reference
from torch import Tensor

from benchmarks.kernels.inputs import CrossInputs, OursBackend, project

Outputs = tuple[Tensor, ...]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [R, Q, H, D], key [R, P, H, D], value [R, P, H, D]) -> [R, Q, H, D]."""


Mix = Callable[[CrossInputs, Tensor], Tensor]
"""(inputs, keys and values of the images [I, P, 2, H, D]) -> of the contexts [K, P, 2, H, D]."""


def eager_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Matmul, softmax in float32 (float64 for float64), matmul."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
    probabilities = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(v.dtype)
    return (probabilities @ v).transpose(1, 2)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's fused attention: flash, cuDNN or memory-efficient, whichever it chooses."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention without a score function: nothing of ours can be said in one. Fast only when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = flex_attention(q, k, v)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def flash_varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """flash-attn's variable-length function; its lengths are all alike here, as the contexts' are."""
    from flash_attn import flash_attn_varlen_func

    rows, q, p = query.shape[0], query.shape[1], key.shape[1]
    cu_q = torch.arange(0, (rows + 1) * q, q, dtype=torch.int32, device=query.device)
    cu_k = torch.arange(0, (rows + 1) * p, p, dtype=torch.int32, device=query.device)
    out = flash_attn_varlen_func(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), cu_q, cu_k, q, p)
    return out.unflatten(0, (rows, q))


def mix_eager(inputs: CrossInputs) -> Outputs:
    """Patch logits in float32, masked softmax: the reference."""
    return (_mix(inputs, "reference"),)


def mix_linear(inputs: CrossInputs) -> Outputs:
    """A Linear in the features' dtype, then the softmax in float32: what a model would write."""
    logits = torch.nn.functional.linear(inputs.features, inputs.score_weight.to(inputs.features.dtype)[None])[..., 0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (masked_softmax_reference(wide, inputs.groups, context=inputs.context),)


def mix_ours(inputs: CrossInputs) -> Outputs:
    return (_mix(inputs, inputs.backend),)


def _mix(inputs: CrossInputs, backend: OursBackend) -> Tensor:
    return image_mix_weights(
        inputs.features, inputs.score_weight, None, inputs.groups, context=inputs.context, backend=backend
    )


def op_materialised(inputs: CrossInputs, attention: Attention) -> Outputs:
    """The contextual features, projected and read."""
    key_value = project(inputs, inputs.contextual)
    return (attention(inputs.context_query, *key_value.unbind(2)),)


def op_mixed(inputs: CrossInputs, mix: Mix) -> Outputs:
    """The images' keys and values, mixed and read: no second projection."""
    return (sdpa(inputs.context_query, *mix(inputs, inputs.key_value).unbind(2)),)


def op_ours(inputs: CrossInputs) -> Outputs:
    return (_ours(inputs, inputs.key_value),)


def op_loop(inputs: CrossInputs) -> Outputs:
    """One image at a time: its context projected and read; with `all` a sample's one context again for every image."""
    outputs = [_loop_w(inputs, j) for j in range(inputs.shape.most_images)]
    return (_from_slots_w(inputs, outputs),)


def cross_materialised(inputs: CrossInputs, attention: Attention) -> Outputs:
    own = project(inputs, inputs.features)
    return attention(inputs.query, *own.unbind(2)), *op_materialised(inputs, attention)


def cross_mixed(inputs: CrossInputs, mix: Mix) -> Outputs:
    own = project(inputs, inputs.features)
    return sdpa(inputs.query, *own.unbind(2)), sdpa(inputs.context_query, *mix(inputs, own).unbind(2))


def cross_ours(inputs: CrossInputs) -> Outputs:
    own = project(inputs, inputs.features)
    return sdpa(inputs.query, *own.unbind(2)), _ours(inputs, own)


def cross_dual(inputs: CrossInputs, tiles: tuple[int, int, int, int]) -> Outputs:
    """Both streams in one launch, without a graph; `others` alone. tiles: the fields of a KernelSetting."""
    from samtrain_kernels.settings import KernelSetting

    from benchmarks.kernels.dual import dual_forward

    with torch.no_grad():
        key, value = project(inputs, inputs.features).unbind(2)
        of_w, _, of_q, _ = dual_forward(
            inputs.query, inputs.context_query, key, value, inputs.weights, inputs.groups,
            setting=KernelSetting(*tiles),
        )  # fmt: skip
    return of_q, of_w


def cross_loop(inputs: CrossInputs) -> Outputs:
    slots, of_q, of_w = inputs.slots, [], []
    for j in range(inputs.shape.most_images):
        images = slots.images[j]
        of_q.append(_loop_attention(inputs, inputs.query[images], inputs.features[images]))
        of_w.append(_loop_w(inputs, j))
    return torch.cat(of_q)[slots.order], _from_slots_w(inputs, of_w)


def _ours(inputs: CrossInputs, key_value: Tensor) -> Tensor:
    key, value = key_value.unbind(2)
    return context_attention(
        inputs.context_query,
        key,
        value,
        inputs.weights,
        inputs.groups,
        context=inputs.context,
        queries="image" if inputs.context == "others" else "group",
        backend=inputs.backend,
    )


def mix_by_einsum(inputs: CrossInputs, key_value: Tensor) -> Tensor:
    """[I, P, 2, H, D] -> [K, P, 2, H, D]."""
    return mix_images(key_value, inputs.weights, inputs.groups, context=inputs.context)


def mix_by_sum(inputs: CrossInputs, key_value: Tensor) -> Tensor:
    """The same as a sum over images that a compiler fuses into one pass; without an index where samples are alike."""
    groups, weights = inputs.groups, inputs.weights[..., None, None, None]  # [K, N, P, 1, 1, 1]
    is_uniform = len(set(inputs.shape.counts)) == 1
    size = (inputs.shape.groups, inputs.shape.most_images)
    of_group = key_value.unflatten(0, size) if is_uniform else key_value[groups.images_of_group]  # [S, N, P, 2, H, D]
    if inputs.context == "all":
        return sum_of([weights[:, j] * of_group[:, j] for j in range(size[1])], key_value.dtype)
    if is_uniform:
        weights = weights.unflatten(0, size)  # [S, N, N, P, 1, 1, 1]
        terms = [weights[:, :, j] * of_group[:, None, j] for j in range(size[1])]
        return sum_of(terms, key_value.dtype).flatten(0, 1)
    return sum_of([weights[:, j] * of_group[groups.group_of_image, j] for j in range(size[1])], key_value.dtype)


def sum_of(terms: list[Tensor], dtype: torch.dtype) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(dtype)


def _loop_w(inputs: CrossInputs, j: int) -> Tensor:
    """The W stream of the images at place `j`: [rows, Q, H, D]."""
    rows = inputs.slots.images[j] if inputs.context == "others" else inputs.slots.samples[j]
    return _loop_attention(inputs, inputs.context_query[rows], inputs.contextual[rows])


def _loop_attention(inputs: CrossInputs, query: Tensor, features: Tensor) -> Tensor:
    """Keys and values by a linear layer each, as BERT has them."""
    linear = torch.nn.functional.linear
    heads = (inputs.shape.heads, inputs.shape.head_dim)
    key_weight, value_weight = inputs.kv_weight.chunk(2)
    key_bias, value_bias = inputs.kv_bias.chunk(2)
    key = linear(features, key_weight, key_bias).unflatten(-1, heads)
    value = linear(features, value_weight, value_bias).unflatten(-1, heads)
    return eager_attention(query, key, value)


def _from_slots_w(inputs: CrossInputs, outputs: list[Tensor]) -> Tensor:
    """Outputs by place -> [K, Q, H, D]. With `all` every image of a sample gave the same: their mean, so that the
    backward pass runs through all of them."""
    by_image = torch.cat(outputs)[inputs.slots.order]
    if inputs.context == "others":
        return by_image
    counts = inputs.groups.valid.sum(1)[:, None, None, None, None]
    of_group = by_image[inputs.groups.images_of_group] * inputs.groups.valid[:, :, None, None, None]
    return (of_group / counts).sum(1).to(by_image.dtype)
