"""Triton kernels of context attention, forward and backward.

Legend: I images, S samples (groups), N the largest number of images of a sample, P patches, H heads, D width of a head,
Q queries of a query set, R query sets (one per image or one per sample), K contexts. A program works on B query sets of
one sample and one head, M = B * BLOCK_Q rows (BLOCK_Q: Q rounded up), and on tiles of W patches.

Images are mixed in score space. With a_j the weights of a context and j over the images of the sample,

    S = scale * sum_j a_j * (Q K_j^T)        O = sum_j (softmax(S) * a_j) V_j

so mixed keys and values never exist, all products run on the tensor cores, and a tile of K_j or V_j serves the B query
sets of a program. Softmax has base 2 and a running maximum per row. The backward recomputes it from `lse`:

    dP = sum_j a_j * (dO V_j^T)        dS = scale * P * (dP - rowsum(dO * O))        dQ = sum_j (dS * a_j) K_j
    da_j = sum over the rows of a query set of dS * (Q K_j^T) + P * (dO V_j^T)
    dK_j = sum over contexts k of (a_kj * dS_k)^T Q_k        dV_j = sum over contexts k of (a_kj * P_k)^T dO_k

Every element has one writer and no sum depends on timing, so results repeat bit by bit. P and dS reach the kernel of dK
and dV, and the gradients of biases, through scratch memory: transposing the result of a matrix product in registers is
what Triton has miscompiled on Hopper (flash-linear-attention #640, #988).

A ViT gives 2^n + 1 patches. The first P mod W patches are one narrow tile with a mask, all others full tiles without.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from samtrain_kernels.aot import AotCase
from samtrain_kernels.context_attention.op import Tables
from samtrain_kernels.context_attention.reference import LOG2E, AttentionInputs, Queries, sum_of_group
from samtrain_kernels.settings import ContextKernel, KernelSetting, gpu_of, setting_for
from samtrain_kernels.tables import Context

ALIGNED = 16
"""Full tiles start at multiples of so many columns of the scratch memory, and its rows are multiples of it long."""


# ---- Parts of a program


@triton.jit
def _block(cu_images, num_blocks, B: tl.constexpr, QUERIES_OF_GROUP: tl.constexpr):
    """Which part of which group this program does: the group, the first of its images and their number, the first of
    its query sets and their number, and the slot in the group of this program's first query set."""
    block = tl.program_id(0)
    group = block // num_blocks
    first_image = tl.load(cu_images + group)
    num_images = tl.load(cu_images + group + 1) - first_image
    first_set = first_image
    num_sets = num_images
    if QUERIES_OF_GROUP:
        first_set = group
        num_sets = 1
    return group, first_image, num_images, first_set, num_sets, (block % num_blocks) * B


@triton.jit
def _query_sets(first_set, num_sets, first_slot, B: tl.constexpr):
    """This program's query sets: (the first one, int64; how far each is from it, [B]; whether it exists, [B]).

    One that does not exist reads what the first one reads, so that no load needs a mask for it.
    """
    sets = tl.arange(0, B)
    live = first_slot + sets < num_sets
    return (first_set + first_slot).to(tl.int64), tl.where(live, sets, 0), live


@triton.jit
def _contexts(weights, group, query_sets, first_slot, context_size, CONTEXT_OF_GROUP: tl.constexpr):
    """The weights of this program's contexts: (pointer to those of the first one; offsets of the others, and slots that
    they do not read, each [1] or [B])."""
    first_set, sets, _ = query_sets
    if CONTEXT_OF_GROUP:
        first = weights + group.to(tl.int64) * context_size
        offsets = tl.zeros([1], tl.int32)
        unread_slots = tl.full([1], -1, tl.int32)
    else:
        first = weights + first_set * context_size
        offsets = sets * context_size
        unread_slots = first_slot + sets
    return first, offsets, unread_slots


@triton.jit
def _images(first_image, num_images, first_slot, B: tl.constexpr, CONTEXT_OF_GROUP: tl.constexpr):
    """(first image, int64; number of images to read; slot to leave out, or one that never comes).

    A program with a single context of `others` leaves out its own image; with more, another one reads it.
    """
    num_read = num_images
    skipped = num_images
    if B == 1 and not CONTEXT_OF_GROUP:
        num_read = num_images - 1
        skipped = first_slot
    return first_image.to(tl.int64), num_read, skipped


@triton.jit
def _of_rows(x, BLOCK_Q: tl.constexpr):
    """[B] -> [M]: what belongs to a query set, for each of its rows."""
    spread = tl.broadcast_to(x[:, None], [x.shape[0], BLOCK_Q])
    return tl.reshape(spread, [x.shape[0] * BLOCK_Q])


@triton.jit
def _rows(query_sets, stride_set, stride_query, num_queries, BLOCK_Q: tl.constexpr):
    """The rows of a tensor that begins with [R, Q], for this program's queries: (offset of the first query set, int64;
    offsets from there, [M]; whether the query exists, [M])."""
    first_set, sets, live = query_sets
    queries = tl.arange(0, sets.shape[0] * BLOCK_Q) % BLOCK_Q
    offsets = _of_rows(sets, BLOCK_Q) * stride_set + queries * stride_query
    return first_set * stride_set, offsets, _of_rows(live, BLOCK_Q) & (queries < num_queries)


@triton.jit
def _row_tile(pointer, query_sets, stride_set, stride_query, num_queries, D: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Pointers to the D elements of one head for every row, and their mask: [M, D], [M, 1]."""
    first, offsets, mask = _rows(query_sets, stride_set, stride_query, num_queries, BLOCK_Q)
    return (pointer + first + offsets)[:, None] + tl.arange(0, D)[None, :], mask[:, None]


@triton.jit
def _load_weights(weights, slot, patches, inside, num_patches, MASKED: tl.constexpr):
    """a_j[p] in the contexts of this program, fp32: [1, W] where they share one (`all`), else [B, W].

    weights: as `_contexts` gives them.
    """
    first, offsets, unread_slots = weights
    pointers = (first + offsets)[:, None] + (slot * num_patches + patches)[None, :]
    # A program with a single context never comes to a slot that the context does not read (`_images`).
    if unread_slots.shape[0] > 1:
        mask = (unread_slots != slot)[:, None]
        if MASKED:
            mask = mask & inside[None, :]
        a = tl.load(pointers, mask=mask, other=0.0)
    elif MASKED:
        a = tl.load(pointers, mask=inside[None, :], other=0.0)
    else:
        a = tl.load(pointers)
    return a


@triton.jit
def _load_patches(source, image, patches, inside, D: tl.constexpr, MASKED: tl.constexpr):
    """[W, D]: one head of the keys or values of an image.

    source: (pointer, strides of images and patches, pointer to the biases, stride of the biases).
    """
    pointer, stride_image, stride_patch, _, _ = source
    pointers = pointer + image * stride_image + (patches * stride_patch)[:, None] + tl.arange(0, D)[None, :]
    if MASKED:
        x = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _bias_row(source, image, D: tl.constexpr):
    """Pointers to the bias of an image's keys or values, one head: [1, D]."""
    _, _, _, bias, stride_bias = source
    return bias + image * stride_bias + tl.arange(0, D)[None, :]


@triton.jit
def _mix(a, x):
    """a * x for a [1 or B, W] and x [M, W]: a context's weights for every row of its query sets."""
    x_of_context = tl.reshape(x, [a.shape[0], x.shape[0] // a.shape[0], x.shape[1]])
    return tl.reshape(x_of_context * a[:, None, :], [x.shape[0], x.shape[1]])


@triton.jit
def _products(rows, x, source, image, D: tl.constexpr, HAS_BIAS: tl.constexpr):
    """rows (x + bias)^T for rows [M, D] and keys or values x [W, D] of an image: [M, W], fp32."""
    # ieee: Triton's default rounds float32 operands to TF32.
    products = tl.dot(rows, tl.trans(x), input_precision="ieee")
    if HAS_BIAS:
        # As a product with 16 vectors, all but one zero: a sum over [M, D] would hold the rows in registers (sm_90,
        # forward, B = 2, W = 64: 241 of them against 168).
        vectors = tl.arange(0, 16)[:, None]
        bias = tl.load(_bias_row(source, image, D) + 0 * vectors, mask=vectors == 0, other=0.0)
        products += tl.sum(tl.dot(rows, tl.trans(bias), input_precision="ieee"), 1)[:, None]
    return products


@triton.jit
def _add_product(acc, left, x, source, image, D: tl.constexpr, HAS_BIAS: tl.constexpr):
    """acc + left (x + bias) for left [M, W], fp32, and keys or values x [W, D] of an image: [M, D], fp32."""
    acc = tl.dot(left.to(x.dtype), x, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.sum(left, 1)[:, None] * tl.load(_bias_row(source, image, D)).to(tl.float32)
    return acc


@triton.jit
def _slot(step, skipped):
    """The slot read in a step of a loop that leaves out the slot `skipped`."""
    return step + (step >= skipped).to(tl.int32)


# ---- Forward


@triton.jit
def _forward_tile(
    acc, peak, total, q, key, value, weights, images, patches, inside, num_patches, scale_log2,
    D: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: the unscaled output [M, D], its maxima and sums [M], with W more patches."""
    first_image, num_read, skipped = images
    scores = tl.zeros([q.shape[0], patches.shape[0]], tl.float32)
    for step in range(num_read):
        slot = _slot(step, skipped)
        image = first_image + slot
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)
        k = _load_patches(key, image, patches, inside, D, MASKED)
        scores += _mix(a, _products(q, k, key, image, D, HAS_KEY_BIAS))
    scores *= scale_log2
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2(peak - new_peak)
    p = tl.exp2(scores - new_peak[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    for step in range(num_read):
        slot = _slot(step, skipped)
        image = first_image + slot
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)
        v = _load_patches(value, image, patches, inside, D, MASKED)
        acc = _add_product(acc, _mix(a, p), v, value, image, D, HAS_VALUE_BIAS)
    return acc, new_peak, total


@triton.jit
def context_forward_kernel(
    query, key, value, weights, key_bias, value_bias, cu_images, output, lse,
    query_stride_set, query_stride_query, query_stride_head,
    key_stride_image, key_stride_patch, key_stride_head,
    value_stride_image, value_stride_patch, value_stride_head,
    num_blocks, num_slots, num_patches, num_ragged, num_queries, num_heads, scale_log2,
    D: tl.constexpr, B: tl.constexpr, BLOCK_Q: tl.constexpr, W: tl.constexpr, RAGGED_W: tl.constexpr,
    CONTEXT_OF_GROUP: tl.constexpr, QUERIES_OF_GROUP: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr,
):  # fmt: skip
    """output [R, Q, H, D] and lse [R, H, Q] (base 2), contiguous. Grid (S * num_blocks, H)."""
    group, first_image, num_images, first_set, num_sets, first_slot = _block(cu_images, num_blocks, B, QUERIES_OF_GROUP)
    if first_slot >= num_sets:
        return
    head = tl.program_id(1)
    sets = _query_sets(first_set, num_sets, first_slot, B)
    weights = _contexts(weights, group, sets, first_slot, num_slots * num_patches, CONTEXT_OF_GROUP)
    images = _images(first_image, num_images, first_slot, B, CONTEXT_OF_GROUP)
    keys = (key + head * key_stride_head, key_stride_image, key_stride_patch, key_bias + head * D, num_heads * D)
    values = (
        value + head * value_stride_head, value_stride_image, value_stride_patch, value_bias + head * D, num_heads * D
    )  # fmt: skip
    pointers, mask = _row_tile(
        query + head * query_stride_head, sets, query_stride_set, query_stride_query, num_queries, D, BLOCK_Q
    )
    q = tl.load(pointers, mask=mask, other=0.0)

    acc = tl.zeros([B * BLOCK_Q, D], tl.float32)
    peak = tl.full([B * BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([B * BLOCK_Q], tl.float32)
    if RAGGED_W > 0:
        first_patches = tl.arange(0, RAGGED_W)
        acc, peak, total = _forward_tile(
            acc, peak, total, q, keys, values, weights, images,
            first_patches, first_patches < num_ragged, num_patches, scale_log2,
            D, HAS_KEY_BIAS, HAS_VALUE_BIAS, True,
        )  # fmt: skip
    for tile in range((num_patches - num_ragged) // W):
        patches = num_ragged + tile * W + tl.arange(0, W)
        acc, peak, total = _forward_tile(
            acc, peak, total, q, keys, values, weights, images,
            patches, patches < num_patches, num_patches, scale_log2,
            D, HAS_KEY_BIAS, HAS_VALUE_BIAS, False,
        )  # fmt: skip

    width = num_heads * D
    pointers, mask = _row_tile(output + head * D, sets, num_queries * width, width, num_queries, D, BLOCK_Q)
    tl.store(pointers, (acc * (1.0 / total)[:, None]).to(output.dtype.element_ty), mask=mask)
    first, offsets, mask = _rows(sets, num_heads * num_queries, 1, num_queries, BLOCK_Q)
    tl.store(lse + first + head * num_queries + offsets, peak + tl.log2(total), mask=mask)


# ---- Backward: queries and weights


@triton.jit
def _store_weights_gradient(gradient, slot, x, patches, inside, unread_slots, num_patches):
    """x [B, W], or zero where a context does not read the slot, to the share of this head in the weights' gradient.

    gradient: (pointer to the share of the first query set; offsets of the others, whether they exist, each [B]).
    """
    first, offsets, live = gradient
    x = tl.where((unread_slots != slot)[:, None], x, 0.0)
    pointers = (first + offsets)[:, None] + (slot * num_patches + patches)[None, :]
    tl.store(pointers, x, mask=live[:, None] & inside[None, :])


@triton.jit
def _backward_tile(
    dq, q, do, lse, delta, keys, values, weights, weights_gradient, images, num_images, scratch, columns,
    patches, inside, num_slots, num_patches, scale, scale_log2,
    D: tl.constexpr, B: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr,
    SKIPS: tl.constexpr, SCRATCH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq [M, D] with W more patches; stores their share of the weights' gradient and, if asked, P and dS."""
    first_image, num_read, skipped = images
    M: tl.constexpr = q.shape[0]
    W: tl.constexpr = patches.shape[0]
    scores = tl.zeros([M, W], tl.float32)
    dp = tl.zeros([M, W], tl.float32)
    for step in range(num_read):
        slot = _slot(step, skipped)
        image = first_image + slot
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)
        k = _load_patches(keys, image, patches, inside, D, MASKED)
        v = _load_patches(values, image, patches, inside, D, MASKED)
        scores += _mix(a, _products(q, k, keys, image, D, HAS_KEY_BIAS))
        dp += _mix(a, _products(do, v, values, image, D, HAS_VALUE_BIAS))
    p = tl.exp2(scores * scale_log2 - lse[:, None])
    if MASKED:
        p = tl.where(inside[None, :], p, 0.0)
    ds = p * (dp - delta[:, None]) * scale
    if SCRATCH:
        p_scratch, ds_scratch, rows, row_mask = scratch
        mask = row_mask[:, None] & inside[None, :]
        tl.store((p_scratch + rows)[:, None] + columns[None, :], p.to(q.dtype), mask=mask)
        tl.store((ds_scratch + rows)[:, None] + columns[None, :], ds.to(q.dtype), mask=mask)
    _, _, unread_slots = weights
    for step in range(num_read):
        slot = _slot(step, skipped)
        image = first_image + slot
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)
        k = _load_patches(keys, image, patches, inside, D, MASKED)
        v = _load_patches(values, image, patches, inside, D, MASKED)
        dots = ds * _products(q, k, keys, image, D, HAS_KEY_BIAS) + p * _products(
            do, v, values, image, D, HAS_VALUE_BIAS
        )
        da = tl.sum(tl.reshape(dots, [B, M // B, W]), 1)
        _store_weights_gradient(weights_gradient, slot, da, patches, inside, unread_slots, num_patches)
        dq = _add_product(dq, _mix(a, ds), k, keys, image, D, HAS_KEY_BIAS)
    zeros = tl.zeros([B, W], tl.float32)
    for slot in range(num_images, num_slots):
        _store_weights_gradient(weights_gradient, slot, zeros, patches, inside, unread_slots, num_patches)
    if SKIPS:
        _store_weights_gradient(weights_gradient, skipped, zeros, patches, inside, unread_slots, num_patches)
    return dq


@triton.jit
def context_backward_kernel(
    output_gradient, query, key, value, weights, key_bias, value_bias, output, lse, cu_images,
    query_gradient, weights_gradient, p_scratch, ds_scratch,
    gradient_stride_set, gradient_stride_query, gradient_stride_head,
    query_stride_set, query_stride_query, query_stride_head,
    key_stride_image, key_stride_patch, key_stride_head,
    value_stride_image, value_stride_patch, value_stride_head,
    num_blocks, num_slots, num_patches, num_ragged, num_queries, num_heads, num_columns, full_columns,
    scale, scale_log2,
    D: tl.constexpr, B: tl.constexpr, BLOCK_Q: tl.constexpr, W: tl.constexpr, RAGGED_W: tl.constexpr,
    CONTEXT_OF_GROUP: tl.constexpr, QUERIES_OF_GROUP: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """query_gradient [R, Q, H, D]; weights_gradient [R, H, N, P], fp32, to be summed over heads (and query sets);
    scratch [R, H, Q, num_columns], full tiles from column full_columns on. All contiguous. Grid (S * num_blocks, H)."""
    group, first_image, num_images, first_set, num_sets, first_slot = _block(cu_images, num_blocks, B, QUERIES_OF_GROUP)
    if first_slot >= num_sets:
        return
    head = tl.program_id(1)
    sets = _query_sets(first_set, num_sets, first_slot, B)
    weights = _contexts(weights, group, sets, first_slot, num_slots * num_patches, CONTEXT_OF_GROUP)
    images = _images(first_image, num_images, first_slot, B, CONTEXT_OF_GROUP)
    keys = (key + head * key_stride_head, key_stride_image, key_stride_patch, key_bias + head * D, num_heads * D)
    values = (
        value + head * value_stride_head, value_stride_image, value_stride_patch, value_bias + head * D, num_heads * D
    )  # fmt: skip

    pointers, mask = _row_tile(
        query + head * query_stride_head, sets, query_stride_set, query_stride_query, num_queries, D, BLOCK_Q
    )
    q = tl.load(pointers, mask=mask, other=0.0)
    pointers, mask = _row_tile(
        output_gradient + head * gradient_stride_head, sets, gradient_stride_set, gradient_stride_query, num_queries,
        D, BLOCK_Q,
    )  # fmt: skip
    do = tl.load(pointers, mask=mask, other=0.0)
    width = num_heads * D
    pointers, mask = _row_tile(output + head * D, sets, num_queries * width, width, num_queries, D, BLOCK_Q)
    delta = tl.sum(do.to(tl.float32) * tl.load(pointers, mask=mask, other=0.0).to(tl.float32), 1)
    first, offsets, row_mask = _rows(sets, num_heads * num_queries, 1, num_queries, BLOCK_Q)
    first += head * num_queries
    lse_of_rows = tl.load(lse + first + offsets, mask=row_mask, other=0.0)
    scratch = (p_scratch + first * num_columns, ds_scratch + first * num_columns, offsets * num_columns, row_mask)
    first_set, set_offsets, live = sets
    share = num_slots * num_patches
    shares = (weights_gradient + (first_set * num_heads + head) * share, set_offsets * (num_heads * share), live)

    dq = tl.zeros([B * BLOCK_Q, D], tl.float32)
    if RAGGED_W > 0:
        first_patches = tl.arange(0, RAGGED_W)
        dq = _backward_tile(
            dq, q, do, lse_of_rows, delta, keys, values, weights, shares, images, num_images, scratch,
            full_columns - num_ragged + first_patches, first_patches, first_patches < num_ragged,
            num_slots, num_patches, scale, scale_log2,
            D, B, HAS_KEY_BIAS, HAS_VALUE_BIAS, B == 1 and not CONTEXT_OF_GROUP, SCRATCH, True,
        )  # fmt: skip
    for tile in range((num_patches - num_ragged) // W):
        columns = tile * W + tl.arange(0, W)
        dq = _backward_tile(
            dq, q, do, lse_of_rows, delta, keys, values, weights, shares, images, num_images, scratch,
            full_columns + columns, num_ragged + columns, columns >= 0, num_slots, num_patches,
            scale, scale_log2,
            D, B, HAS_KEY_BIAS, HAS_VALUE_BIAS, B == 1 and not CONTEXT_OF_GROUP, SCRATCH, False,
        )  # fmt: skip
    pointers, mask = _row_tile(query_gradient + head * D, sets, num_queries * width, width, num_queries, D, BLOCK_Q)
    tl.store(pointers, dq.to(query_gradient.dtype.element_ty), mask=mask)


# ---- Backward: keys and values


@triton.jit
def context_kv_grad_kernel(
    output_gradient, query, weights, p_scratch, ds_scratch, cu_images, group_of_image, slot_of_image,
    key_gradient, value_gradient,
    gradient_stride_set, gradient_stride_query, gradient_stride_head,
    query_stride_set, query_stride_query, query_stride_head,
    num_tiles, num_slots, num_patches, num_queries, num_heads, num_columns, first_column,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, W: tl.constexpr,
    CONTEXT_OF_GROUP: tl.constexpr, QUERIES_OF_GROUP: tl.constexpr,
):  # fmt: skip
    """key_gradient and value_gradient [I, P, H, D], contiguous. Grid (I * num_tiles, H); tiles of scratch columns, the
    first patch is in first_column."""
    head = tl.program_id(1)
    image = tl.program_id(0) // num_tiles
    columns = (tl.program_id(0) % num_tiles) * W + tl.arange(0, W)
    patches = columns - first_column
    inside = (patches >= 0) & (patches < num_patches)
    group = tl.load(group_of_image + image)
    slot = tl.load(slot_of_image + image).to(tl.int32)
    first_set = tl.load(cu_images + group).to(tl.int64)
    num_read = tl.load(cu_images + group + 1) - tl.load(cu_images + group)
    skipped = num_read
    if QUERIES_OF_GROUP:
        first_set = group
        num_read = 1
        skipped = 1
    if not CONTEXT_OF_GROUP:
        num_read = num_read - 1
        skipped = slot

    dk = tl.zeros([W, D], tl.float32)
    dv = tl.zeros([W, D], tl.float32)
    for step in range(num_read):
        query_set = first_set + _slot(step, skipped)
        context = query_set
        if CONTEXT_OF_GROUP:
            context = group
        a = tl.load(weights + (context * num_slots + slot) * num_patches + patches, mask=inside, other=0.0)
        sets = (query_set, tl.zeros([1], tl.int32), tl.full([1], True, tl.int1))
        pointers, mask = _row_tile(
            query + head * query_stride_head, sets, query_stride_set, query_stride_query, num_queries, D, BLOCK_Q
        )
        q = tl.load(pointers, mask=mask, other=0.0)
        pointers, mask = _row_tile(
            output_gradient + head * gradient_stride_head, sets, gradient_stride_set, gradient_stride_query,
            num_queries, D, BLOCK_Q,
        )  # fmt: skip
        do = tl.load(pointers, mask=mask, other=0.0)
        first, rows, row_mask = _rows(sets, num_heads * num_queries, 1, num_queries, BLOCK_Q)
        first = (first + head * num_queries) * num_columns
        rows = first + rows * num_columns
        mask = row_mask[:, None] & inside[None, :]
        p = tl.load((p_scratch + rows)[:, None] + columns[None, :], mask=mask, other=0.0)
        ds = tl.load((ds_scratch + rows)[:, None] + columns[None, :], mask=mask, other=0.0)
        dk = tl.dot((tl.trans(ds).to(tl.float32) * a[:, None]).to(q.dtype), q, dk, input_precision="ieee")
        dv = tl.dot((tl.trans(p).to(tl.float32) * a[:, None]).to(do.dtype), do, dv, input_precision="ieee")
    rows = ((image.to(tl.int64) * num_patches + patches) * num_heads + head) * D
    offsets = rows[:, None] + tl.arange(0, D)[None, :]
    tl.store(key_gradient + offsets, dk.to(key_gradient.dtype.element_ty), mask=inside[:, None])
    tl.store(value_gradient + offsets, dv.to(value_gradient.dtype.element_ty), mask=inside[:, None])


# ---- Launches


class Launch(NamedTuple):
    """A kernel with everything it is started with."""

    kernel: ContextKernel
    function: Any
    grid: tuple[int, int]
    arguments: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    setting: KernelSetting

    def run(self) -> None:
        self.function[self.grid](**self.arguments, **self.constexprs, **self.setting.options)


def forward(x: AttentionInputs, *, setting: KernelSetting | None = None) -> tuple[Tensor, Tensor]:
    """See `context_attention_reference`. float16, bfloat16 or float32; at least one image; D a power of two >= 16."""
    x = _kernel_inputs(x)
    num_sets, num_queries, num_heads, _ = x.query.shape
    output = x.query.new_empty(x.query.shape)
    lse = x.query.new_empty(num_sets, num_heads, num_queries, dtype=torch.float32)
    _forward_launch(x, output, lse, setting).run()
    return output, lse


def backward(
    x: AttentionInputs,
    output_gradient: Tensor,
    output: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *,
    setting: KernelSetting | None = None,
    kv_setting: KernelSetting | None = None,
) -> list[Tensor]:
    """See `context_attention_backward_reference`. Keys and values both get a gradient where one of them needs it."""
    x, output_gradient = _kernel_inputs(x), _dense_rows(output_gradient)
    needs_images, needs_biases = needs[1] or needs[2], needs[4] or needs[5]
    setting = setting or _setting("context_backward", x)
    dq = x.query.new_empty(x.query.shape)
    shares = x.weights.new_empty(x.query.shape[0], x.query.shape[2], *x.weights.shape[1:])  # [R, H, N, P]
    scratch = _Scratch.of(x, setting) if needs_images or needs_biases else None
    _backward_launch(x, output_gradient, output, lse, dq, shares, scratch, setting).run()
    dw = shares.sum(1)
    gradients: dict[int, Tensor] = {0: dq, 3: sum_of_group(dw, x.groups) if x.contexts_are_shared else dw}
    if scratch is not None and needs_images:
        dk, dv = x.key.new_empty(x.key.shape), x.value.new_empty(x.value.shape)
        _kv_grad_launch(x, output_gradient, scratch, dk, dv, kv_setting).run()
        gradients |= {1: dk, 2: dv}
    if scratch is not None and needs[4]:
        gradients[4] = _bias_gradient(x, scratch.patches(scratch.ds, x.key.shape[1]), x.query)
    if scratch is not None and needs[5]:
        gradients[5] = _bias_gradient(x, scratch.patches(scratch.p, x.key.shape[1]), output_gradient)
    return [gradients[i] for i, needed in enumerate(needs) if needed]


class _Scratch(NamedTuple):
    """P and dS [R, H, Q, columns] on their way to other kernels; patch p is in column first_column + p.

    The full tiles start at full_columns, a multiple of ALIGNED, after the first `num_ragged` patches.
    """

    p: Tensor
    ds: Tensor
    first_column: int
    full_columns: int

    @staticmethod
    def of(x: AttentionInputs, setting: KernelSetting) -> "_Scratch":
        num_sets, num_queries, num_heads, _ = x.query.shape
        num_patches = x.key.shape[1]
        num_ragged = num_patches % setting.block_patches
        full_columns = _round_up(num_ragged)
        columns = _round_up(full_columns + num_patches - num_ragged)
        p, ds = (x.query.new_empty(num_sets, num_heads, num_queries, columns) for _ in range(2))
        return _Scratch(p, ds, full_columns - num_ragged, full_columns)

    def patches(self, x: Tensor, num_patches: int) -> Tensor:
        """[R, H, Q, P], a view."""
        return x[..., self.first_column : self.first_column + num_patches]


def _bias_gradient(x: AttentionInputs, scratch: Tensor, rows: Tensor) -> Tensor:
    """The gradient [I, H, D] of a bias of keys (from dS and queries) or values (from P and output gradients).

    In float32: where the weights of a context are one or equal, the exact result is a difference of large sums.
    """
    weights = x.live_weights()
    if x.contexts_are_shared:
        weights = weights[x.groups.group_of_image]
    of_slot = torch.einsum("rhqp,rnp->rhqn", scratch.float(), weights)
    of_set = torch.einsum("rhqn,rqhd->rnhd", of_slot, rows.float())
    of_group = of_set if x.queries == "group" else sum_of_group(of_set, x.groups)  # [S, N, H, D]
    return of_group[x.groups.group_of_image, x.groups.slot_of_image].to(rows.dtype)


def _forward_launch(x: AttentionInputs, output: Tensor, lse: Tensor, setting: KernelSetting | None) -> Launch:
    setting = setting or _setting("context_forward", x)
    arguments, constexprs, grid = _shared(x, setting)
    arguments |= {"output": output, "lse": lse}
    return Launch("context_forward", context_forward_kernel, grid, arguments, constexprs, setting)


def _backward_launch(
    x: AttentionInputs,
    output_gradient: Tensor,
    output: Tensor,
    lse: Tensor,
    dq: Tensor,
    dw: Tensor,
    scratch: _Scratch | None,
    setting: KernelSetting,
) -> Launch:
    arguments, constexprs, grid = _shared(x, setting)
    arguments |= {
        "output": output, "lse": lse, "output_gradient": output_gradient, "query_gradient": dq, "weights_gradient": dw,
        **_strides("gradient", "set query head", output_gradient),
        "p_scratch": dq if scratch is None else scratch.p, "ds_scratch": dq if scratch is None else scratch.ds,
        "num_columns": 0 if scratch is None else scratch.p.shape[-1],
        "full_columns": 0 if scratch is None else scratch.full_columns,
        "scale": x.scale,
    }  # fmt: skip
    constexprs |= {"SCRATCH": scratch is not None}
    return Launch("context_backward", context_backward_kernel, grid, arguments, constexprs, setting)


def _kv_grad_launch(
    x: AttentionInputs,
    output_gradient: Tensor,
    scratch: _Scratch,
    dk: Tensor,
    dv: Tensor,
    setting: KernelSetting | None,
) -> Launch:
    setting = setting or _setting("context_kv_grad", x)
    num_images, num_patches, num_heads, head_dim = x.key.shape
    num_tiles = triton.cdiv(scratch.first_column + num_patches, setting.block_patches)
    num_queries = x.query.shape[1]
    arguments = {
        "output_gradient": output_gradient, "query": x.query, "weights": x.weights,
        "p_scratch": scratch.p, "ds_scratch": scratch.ds,
        "cu_images": x.groups.cu_images, "group_of_image": x.groups.group_of_image,
        "slot_of_image": x.groups.slot_of_image, "key_gradient": dk, "value_gradient": dv,
        **_strides("gradient", "set query head", output_gradient), **_strides("query", "set query head", x.query),
        "num_tiles": num_tiles, "num_slots": x.weights.shape[1], "num_patches": num_patches,
        "num_queries": num_queries, "num_heads": num_heads, "num_columns": scratch.p.shape[-1],
        "first_column": scratch.first_column,
    }  # fmt: skip
    constexprs = {
        "D": head_dim, "BLOCK_Q": _block_of(num_queries), "W": setting.block_patches,
        "CONTEXT_OF_GROUP": x.context == "all", "QUERIES_OF_GROUP": x.queries == "group",
    }  # fmt: skip
    return Launch(
        "context_kv_grad", context_kv_grad_kernel, (num_images * num_tiles, num_heads), arguments, constexprs, setting
    )


def _shared(x: AttentionInputs, setting: KernelSetting) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int]]:
    """What the forward and the backward kernel have in common: arguments, constexprs, grid."""
    num_patches, num_heads, head_dim = x.key.shape[1:]
    num_groups, num_slots = x.groups.valid.shape
    num_queries = x.query.shape[1]
    sets_per_block = 1 if x.queries == "group" else setting.images_per_block
    num_blocks = 1 if x.queries == "group" else triton.cdiv(num_slots, sets_per_block)
    num_ragged = num_patches % setting.block_patches
    arguments = {
        "query": x.query, "key": x.key, "value": x.value, "weights": x.weights,
        # Any pointer will do where there is no bias: it is not read.
        "key_bias": x.query if x.key_bias is None else x.key_bias,
        "value_bias": x.query if x.value_bias is None else x.value_bias,
        "cu_images": x.groups.cu_images,
        **_strides("query", "set query head", x.query),
        **_strides("key", "image patch head", x.key), **_strides("value", "image patch head", x.value),
        "num_blocks": num_blocks, "num_slots": num_slots, "num_patches": num_patches, "num_ragged": num_ragged,
        "num_queries": num_queries, "num_heads": num_heads, "scale_log2": x.scale * LOG2E,
    }  # fmt: skip
    constexprs = {
        "D": head_dim, "B": sets_per_block, "BLOCK_Q": _block_of(num_queries), "W": setting.block_patches,
        "RAGGED_W": _block_of(num_ragged) if num_ragged else 0,
        "CONTEXT_OF_GROUP": x.context == "all", "QUERIES_OF_GROUP": x.queries == "group",
        "HAS_KEY_BIAS": x.key_bias is not None, "HAS_VALUE_BIAS": x.value_bias is not None,
    }  # fmt: skip
    return arguments, constexprs, (num_groups * num_blocks, num_heads)


def _kernel_inputs(x: AttentionInputs) -> AttentionInputs:
    """The inputs as kernels read them: query, key and value with any strides but the last, all else contiguous."""
    return x._replace(
        query=_dense_rows(x.query),
        key=_dense_rows(x.key),
        value=_dense_rows(x.value),
        weights=x.weights.contiguous(),
        key_bias=None if x.key_bias is None else x.key_bias.contiguous(),
        value_bias=None if x.value_bias is None else x.value_bias.contiguous(),
    )


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(name: str, axes: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes.split(), x.stride()[:-1], strict=True)}


def _setting(kernel: ContextKernel, x: AttentionInputs) -> KernelSetting:
    device_name, capability = gpu_of(x.query.device)
    return setting_for(
        kernel,
        dtype=x.query.dtype,
        head_dim=x.query.shape[-1],
        images=x.weights.shape[1],
        device_name=device_name,
        capability=capability,
    )


def _round_up(columns: int) -> int:
    return triton.cdiv(columns, ALIGNED) * ALIGNED


def _block_of(size: int) -> int:
    """The tile for a size: a power of two, and at least what a matrix product needs."""
    return max(16, triton.next_power_of_2(size))


# ---- Compiling without a GPU


def aot_cases(kernel: ContextKernel, setting: KernelSetting, *, head_dim: int, dtype: torch.dtype) -> list[AotCase]:
    """The variants of a kernel at a setting, as real calls compile them: packed keys and values, 257 patches, 12 heads,
    32 queries, 16 samples of 5 images. With `all`, images share the queries of their sample at first and have their own
    later; shared ones are a block by themselves, whatever the setting says."""
    variants: dict[str, dict[str, Any]] = {"others": {}, "all": {"context": "all"}}
    group = {"context": "all", "queries": "group"}
    variants["all, queries of the sample"] = group
    if kernel != "context_kv_grad":
        variants["others, 576 patches"] = {"num_patches": 576}
        variants["others, biases"] = {"has_bias": True}
        variants["all, queries of the sample, biases"] = group | {"has_bias": True}
    if kernel == "context_backward":
        variants["others, frozen keys and values"] = {"has_scratch": False}
    return [
        _aot_case(_meta_launch(kernel, setting, head_dim, dtype, **variant), variant=name)
        for name, variant in variants.items()
    ]


def _meta_launch(
    kernel: ContextKernel,
    setting: KernelSetting,
    head_dim: int,
    dtype: torch.dtype,
    *,
    context: Context = "others",
    queries: Queries = "image",
    num_patches: int = 257,
    has_bias: bool = False,
    has_scratch: bool = True,
) -> Launch:
    num_groups, num_slots, num_heads, num_queries = 16, 5, 12, 32
    num_images = num_groups * num_slots

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tables = Tables(
        meta(num_images, dtype=torch.int64),
        meta(num_images, dtype=torch.int64),
        meta(num_groups, num_slots, dtype=torch.int64),
        meta(num_groups, num_slots, dtype=torch.bool),
        meta(num_groups + 1, dtype=torch.int32),
    )
    num_sets = num_images if queries == "image" else num_groups
    rows = meta(num_sets, num_queries, num_heads, head_dim)
    key, value = meta(num_images, num_patches, 2, num_heads, head_dim).unbind(2)
    contexts = num_images if context == "others" else num_groups
    weights = meta(contexts, num_slots, num_patches, dtype=torch.float32)
    bias = meta(num_images, num_heads, head_dim) if has_bias else None
    x = AttentionInputs(rows, key, value, weights, bias, bias, tables, context, queries, head_dim**-0.5)
    lse = meta(num_sets, num_heads, num_queries, dtype=torch.float32)
    if kernel == "context_forward":
        return _forward_launch(x, rows, lse, setting)
    scratch = _Scratch.of(x, setting) if has_scratch else None
    if kernel == "context_backward":
        dw = meta(num_sets, num_heads, num_slots, num_patches, dtype=torch.float32)
        return _backward_launch(x, rows, rows, lse, rows, dw, scratch, setting)
    assert scratch is not None
    return _kv_grad_launch(x, rows, scratch, key, value, setting)


def _aot_case(launch: Launch, *, variant: str) -> AotCase:
    """Types, constants and divisibility as Triton's own launcher derives them from the arguments."""
    signature, constexprs, divisible = {}, dict(launch.constexprs), []
    for name in launch.function.arg_names:
        value = launch.arguments.get(name)
        if isinstance(value, Tensor):
            signature[name] = "*" + _POINTER_TYPES[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            signature[name] = "constexpr"
            if value == 1:
                constexprs[name] = 1
        else:
            signature[name] = "i32"
            if value % ALIGNED == 0:
                divisible.append(name)
    return AotCase(launch.kernel, launch.setting, launch.function, signature, constexprs, variant, tuple(divisible))


_POINTER_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
