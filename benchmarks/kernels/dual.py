"""One forward launch for both streams of a layer, a candidate: `python -m benchmarks.kernels.dual` compiles it.

    python -m benchmarks.kernels.dual    what the compiler makes of it, beside the two launches that ship; no GPU needed

Writes benchmarks/results/dual-aot.json and dual-aot.txt. It is not part of samtrain_kernels: context `others`, forward
alone, no biases. The GPU benchmark measures it in rows of level cross ("dual" in `registry`).

Legend: I images, S samples, N images of a sample, P patches, H heads, D width of a head, Q queries of an image. A
program works on B images of a sample and one head, M = B * BLOCK_Q rows of each stream, and on tiles of W patches.

The context of image i leaves image i out, and the Q stream of image i reads nothing else: of the N x N products of a
sample the Q stream needs just those that the W stream skips. So a tile of K_j, loaded once, is multiplied with the W
rows of the block's images except j, and with the Q rows of j in place of those: as many products as the W stream alone,
two running softmaxes. With B = 1 a program has no tile that both streams read, and does one after the other.

The parts of a program, and its launch, are those of `samtrain_kernels.context_attention.triton`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from samtrain_kernels.aot import AotCase, AotReport, aot_cases, compile_case
from samtrain_kernels.context_attention.reference import AttentionInputs
from samtrain_kernels.context_attention.triton import (
    Launch,
    _add_product,
    _aot_case,
    _block,
    _contexts,
    _dense_rows,
    _forward_launch,
    _forward_tile,
    _images,
    _kernel_inputs,
    _load_patches,
    _load_weights,
    _meta_launch,
    _mix,
    _of_rows,
    _products,
    _query_sets,
    _row_tile,
    _rows,
    _strides,
)
from samtrain_kernels.settings import KernelSetting, setting_for
from samtrain_kernels.tables import ImageTables
from torch import Tensor

from benchmarks.aot import RESULTS, header
from benchmarks.grid import grid
from benchmarks.kernels import floors
from benchmarks.kernels.shapes import SHAPES, Shape

Capability = tuple[int, int]


@triton.jit
def _softmax_step(scores, peak, total, inside, MASKED: tl.constexpr):
    """One step of a running softmax over scores [M, W], base 2: (p [M, W]; shrinkage of what came before, new maxima,
    new sums, each [M])."""
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2(peak - new_peak)
    p = tl.exp2(scores - new_peak[:, None])
    return p, shrink, new_peak, total * shrink + tl.sum(p, 1)


@triton.jit
def _own_tile(
    acc, peak, total, q, key, value, image, patches, inside, scale_log2, D: tl.constexpr, MASKED: tl.constexpr
):
    """The Q stream of a single image, W more patches of that image."""
    k = _load_patches(key, image, patches, inside, D, MASKED)
    scores = _products(q, k, key, image, D, False) * scale_log2
    p, shrink, peak, total = _softmax_step(scores, peak, total, inside, MASKED)
    v = _load_patches(value, image, patches, inside, D, MASKED)
    return _add_product(acc * shrink[:, None], p, v, value, image, D, False), peak, total


@triton.jit
def _both_tile(
    acc, peak, total, own_acc, own_peak, own_total, q, own_q, key, value, weights, first_image, num_images, first_slot,
    patches, inside, num_patches, scale_log2,
    D: tl.constexpr, B: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Both streams of B > 1 images, W more patches. The images of the block come last, and serve both."""
    _, _, own_slots = weights
    num_own = tl.minimum(num_images - first_slot, B)
    scores = tl.zeros([B * BLOCK_Q, patches.shape[0]], tl.float32)
    own_scores = tl.zeros([B * BLOCK_Q, patches.shape[0]], tl.float32)
    for step in range(num_images - num_own):
        slot = step + (step >= first_slot).to(tl.int32) * num_own
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)
        k = _load_patches(key, first_image + slot, patches, inside, D, MASKED)
        scores += _mix(a, _products(q, k, key, first_image + slot, D, False))
    for step in range(num_own):
        slot = first_slot + step
        is_own = _of_rows(own_slots == slot, BLOCK_Q)[:, None]
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)  # 0 where is_own
        k = _load_patches(key, first_image + slot, patches, inside, D, MASKED)
        products = _products(tl.where(is_own, own_q, q), k, key, first_image + slot, D, False)
        scores += _mix(a, products)
        own_scores = tl.where(is_own, products, own_scores)
    p, shrink, peak, total = _softmax_step(scores * scale_log2, peak, total, inside, MASKED)
    own_p, own_shrink, own_peak, own_total = _softmax_step(own_scores * scale_log2, own_peak, own_total, inside, MASKED)
    acc = acc * shrink[:, None]
    own_acc = own_acc * own_shrink[:, None]
    for step in range(num_images - num_own):
        slot = step + (step >= first_slot).to(tl.int32) * num_own
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)
        v = _load_patches(value, first_image + slot, patches, inside, D, MASKED)
        acc = _add_product(acc, _mix(a, p), v, value, first_image + slot, D, False)
    for step in range(num_own):
        slot = first_slot + step
        is_own = _of_rows(own_slots == slot, BLOCK_Q)[:, None]
        a = _load_weights(weights, slot, patches, inside, num_patches, MASKED)
        v = _load_patches(value, first_image + slot, patches, inside, D, MASKED)
        left = tl.where(is_own, own_p, _mix(a, p))
        products = tl.dot(left.to(v.dtype), v, input_precision="ieee")
        acc += tl.where(is_own, 0.0, products)
        own_acc += tl.where(is_own, products, 0.0)
    return acc, peak, total, own_acc, own_peak, own_total


@triton.jit
def _tile(
    acc, peak, total, own_acc, own_peak, own_total, q, own_q, key, value, weights, first_image, num_images, first_slot,
    patches, inside, num_patches, scale_log2,
    D: tl.constexpr, B: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of both running softmaxes with W more patches."""
    if B == 1:
        acc, peak, total = _forward_tile(
            acc, peak, total, q, key, value, weights, _images(first_image, num_images, first_slot, 1, False),
            patches, inside, num_patches, scale_log2, D, False, False, MASKED,
        )  # fmt: skip
        own_acc, own_peak, own_total = _own_tile(
            own_acc, own_peak, own_total, own_q, key, value, first_image + first_slot, patches, inside, scale_log2,
            D, MASKED,
        )  # fmt: skip
    else:
        acc, peak, total, own_acc, own_peak, own_total = _both_tile(
            acc, peak, total, own_acc, own_peak, own_total, q, own_q, key, value, weights, first_image, num_images,
            first_slot, patches, inside, num_patches, scale_log2, D, B, BLOCK_Q, MASKED,
        )  # fmt: skip
    return acc, peak, total, own_acc, own_peak, own_total


@triton.jit
def _store(acc, peak, total, output, lse, sets, head, num_queries, num_heads, D: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Output [I, Q, H, D] and lse [I, H, Q] of this program's images, contiguous."""
    width = num_heads * D
    pointers, mask = _row_tile(output + head * D, sets, num_queries * width, width, num_queries, D, BLOCK_Q)
    tl.store(pointers, (acc * (1.0 / total)[:, None]).to(output.dtype.element_ty), mask=mask)
    first, offsets, mask = _rows(sets, num_heads * num_queries, 1, num_queries, BLOCK_Q)
    tl.store(lse + first + head * num_queries + offsets, peak + tl.log2(total), mask=mask)


@triton.jit
def dual_forward_kernel(
    query, own_query, key, value, weights, cu_images, output, lse, own_output, own_lse,
    query_stride_set, query_stride_query, query_stride_head,
    own_query_stride_set, own_query_stride_query, own_query_stride_head,
    key_stride_image, key_stride_patch, key_stride_head,
    value_stride_image, value_stride_patch, value_stride_head,
    num_blocks, num_slots, num_patches, num_ragged, num_queries, num_heads, scale_log2,
    D: tl.constexpr, B: tl.constexpr, BLOCK_Q: tl.constexpr, W: tl.constexpr, RAGGED_W: tl.constexpr,
):  # fmt: skip
    """query, output, lse: of the W stream; own_*: of the Q stream. Grid (S * num_blocks, H)."""
    group, first_image, num_images, first_set, num_sets, first_slot = _block(cu_images, num_blocks, B, False)
    if first_slot >= num_sets:
        return
    head = tl.program_id(1)
    sets = _query_sets(first_set, num_sets, first_slot, B)
    mixing = _contexts(weights, group, sets, first_slot, num_slots * num_patches, False)
    # Nothing reads the pointers of biases.
    keys = (key + head * key_stride_head, key_stride_image, key_stride_patch, key, 0)
    values = (value + head * value_stride_head, value_stride_image, value_stride_patch, value, 0)
    pointers, mask = _row_tile(
        query + head * query_stride_head, sets, query_stride_set, query_stride_query, num_queries, D, BLOCK_Q
    )
    q = tl.load(pointers, mask=mask, other=0.0)
    pointers, mask = _row_tile(
        own_query + head * own_query_stride_head, sets, own_query_stride_set, own_query_stride_query, num_queries,
        D, BLOCK_Q,
    )  # fmt: skip
    own_q = tl.load(pointers, mask=mask, other=0.0)

    first = first_image.to(tl.int64)
    acc = tl.zeros([B * BLOCK_Q, D], tl.float32)
    own_acc = tl.zeros([B * BLOCK_Q, D], tl.float32)
    peak = tl.full([B * BLOCK_Q], float("-inf"), tl.float32)
    own_peak = tl.full([B * BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([B * BLOCK_Q], tl.float32)
    own_total = tl.zeros([B * BLOCK_Q], tl.float32)
    if RAGGED_W > 0:
        first_patches = tl.arange(0, RAGGED_W)
        acc, peak, total, own_acc, own_peak, own_total = _tile(
            acc, peak, total, own_acc, own_peak, own_total, q, own_q, keys, values, mixing, first, num_images,
            first_slot, first_patches, first_patches < num_ragged, num_patches, scale_log2, D, B, BLOCK_Q, True,
        )  # fmt: skip
    for tile in range((num_patches - num_ragged) // W):
        patches = num_ragged + tile * W + tl.arange(0, W)
        acc, peak, total, own_acc, own_peak, own_total = _tile(
            acc, peak, total, own_acc, own_peak, own_total, q, own_q, keys, values, mixing, first, num_images,
            first_slot, patches, patches < num_patches, num_patches, scale_log2, D, B, BLOCK_Q, False,
        )  # fmt: skip
    _store(acc, peak, total, output, lse, sets, head, num_queries, num_heads, D, BLOCK_Q)
    _store(own_acc, own_peak, own_total, own_output, own_lse, sets, head, num_queries, num_heads, D, BLOCK_Q)


# ---- Launch


def dual_forward(
    query: Tensor,
    context_query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    groups: ImageTables,
    *,
    setting: KernelSetting,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-attention of both streams with `others`, without a graph; at least one image.

    Args:
        query: of the Q stream, which reads its own image, [I, Q, H, D]. context_query: of the W stream, [I, Q, H, D].
        key, value: [I, P, H, D], any strides but the last. weights: [I, N, P] float32.

    Returns:
        Output [I, Q, H, D] and lse [I, H, Q] (base 2) of the W stream, then of the Q stream.
    """
    x = _kernel_inputs(
        AttentionInputs(
            context_query, key, value, weights, None, None, groups, "others", "image", query.shape[-1] ** -0.5
        )
    )
    outputs = [query.new_empty(query.shape) for _ in range(2)]
    lse = [query.new_empty(*query.shape[:1], *query.shape[2:0:-1], dtype=torch.float32) for _ in range(2)]
    forward = _forward_launch(x, outputs[0], lse[0], setting)
    _dual_launch(forward, _dense_rows(query), outputs[1], lse[1]).run()
    return outputs[0], lse[0], outputs[1], lse[1]


def _dual_launch(forward: Launch, query: Tensor, output: Tensor, lse: Tensor) -> Launch:
    """The W stream's launch with the Q stream in it."""
    dropped = {"key_bias", "value_bias"}
    arguments = {name: value for name, value in forward.arguments.items() if name not in dropped}
    arguments |= {"own_query": query, "own_output": output, "own_lse": lse}
    arguments |= _strides("own_query", "set query head", query)
    constexprs = {name: forward.constexprs[name] for name in ("D", "B", "BLOCK_Q", "W", "RAGGED_W")}
    return forward._replace(function=dual_forward_kernel, arguments=arguments, constexprs=constexprs)


# ---- What the compiler makes of it


CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0))
SETTINGS = tuple(
    KernelSetting(*row)
    for row in (
        (1, 64, 4, 2), (1, 64, 8, 2), (2, 32, 4, 2), (2, 64, 4, 2), (2, 64, 8, 2), (2, 32, 8, 2), (4, 32, 8, 2),
    )
)  # fmt: skip
HEAD_DIM, DTYPE = 64, torch.bfloat16

# Of a multiprocessor (CUDA C programming guide, compute capabilities). A program reserves 1 KiB of shared memory more.
REGISTERS = 65_536
WARPS = 64
SHARED_BYTES = {(8, 0): 164 * 1024, (9, 0): 228 * 1024}


def aot_case(setting: KernelSetting) -> AotCase:
    """Shape A as real calls compile it: see `samtrain_kernels.context_attention.triton.aot_cases`."""
    forward = _meta_launch("context_forward", setting, HEAD_DIM, DTYPE)
    given = forward.arguments
    launch = _dual_launch(forward, given["query"], given["output"], given["lse"])
    return replace(_aot_case(launch, variant="others"), kernel="dual_forward")


def resident_programs(report: AotReport) -> int:
    """How many programs fit on a multiprocessor at once: by registers (a warp gets them in units of 256), shared memory
    and warps."""
    warps = report.setting["num_warps"]
    of_warp = -(-report.registers * 32 // 256) * 256
    by_memory = SHARED_BYTES[report.capability] // (report.shared_bytes + 1024)
    return min(REGISTERS // (of_warp * warps), by_memory, WARPS // warps)


def compiled() -> list[dict[str, Any]]:
    """For each chip the shipped setting of the W stream's own launch, then the candidates."""
    compile_for = functools.partial(compile_case, head_dim=HEAD_DIM, dtype=DTYPE)
    rows = []
    for capability in CAPABILITIES:
        shipped = shipped_setting(capability)
        cases = aot_cases("context_forward", shipped, head_dim=HEAD_DIM, dtype=DTYPE)[:1]
        for case in [*cases, *map(aot_case, SETTINGS)]:
            report = compile_for(case, capability=capability)
            programs = resident_programs(report)
            rows_of_stream = report.setting["images_per_block"] * SHAPES["A"].queries
            rows.append(
                asdict(report)
                | {
                    "capability": list(capability),
                    "problems": report.problems(),
                    "resident_programs": programs,
                    "resident_w_rows": programs * rows_of_stream,
                }
            )
            print(f"{report.kernel} {report.setting} sm_{capability[0]}{capability[1]}", file=sys.stderr, flush=True)
    return rows


def shipped_setting(capability: Capability) -> KernelSetting:
    return setting_for(
        "context_forward",
        dtype=DTYPE,
        head_dim=HEAD_DIM,
        images=SHAPES["A"].most_images,
        device_name=None,
        capability=capability,
    )


# ---- What can be counted


def least_work(shape: Shape) -> dict[str, dict[str, float]]:
    """Operations and bytes of device memory of a layer's forward pass, projection of keys and values included: the two
    launches (keys and values read twice) and one launch (read once)."""
    ways: dict[str, floors.How] = {"two launches": "context", "one launch": "fused"}
    found = {}
    for name, how in ways.items():
        work = floors.cross(shape, "others", how, trained=False, direction="forward")
        found[name] = {"flops": work.flops, "bytes": work.bytes}
    return found


def attention_work(shape: Shape, images_per_block: int) -> dict[str, dict[str, float]]:
    """What the programs of both attentions do, padding and repeated reads included: operations of matrix products, and
    bytes of keys and values that tiles load, from device memory or cache. The Q stream's own launch reads once."""
    blocks = [(n, -(-n // images_per_block)) for n in shape.counts]
    alone = images_per_block == 1  # a program of the W stream's launch then leaves its own image out
    w_rows = sum(b * images_per_block * (n - alone) for n, b in blocks)
    w_reads = sum(b * (n - alone) for n, b in blocks)
    dual_rows, dual_reads = sum(b * images_per_block * n for n, b in blocks), sum(b * n for n, b in blocks)

    def work(rows: int, reads: int) -> dict[str, float]:
        return {"flops": floors.attention_flops(shape, rows), "loaded_bytes": floors.key_value_bytes(shape, reads)}

    return {
        "two launches": work(w_rows + shape.images, w_reads + shape.images),
        "one launch": work(dual_rows, dual_reads),
    }


def report_text(result: dict[str, Any]) -> str:
    lines = [
        "Both streams in one forward launch, compiled ahead of time. No GPU has run it; nothing here is a speed.",
        f"triton {result['triton']}, torch {result['torch']}, commit {result['commit'][:12]}"
        + (" with changes to kernels/" if result["kernels_changed_since_commit"] else ""),
        "",
        "Machine code: bfloat16, D 64, 257 patches, context others. programs: resident on a multiprocessor at once, by",
        "65,536 registers, shared memory and warps; W rows: rows of the W stream in them.",
    ]
    head = ("kernel", "gpu", "setting", "regs", "spill ld/st", "smem KiB", "mma", "wgmma", "cp.async", "programs")
    table = [(*head, "W rows", "")]
    for row in result["compiled"]:
        setting = row["setting"]
        table.append(
            (
                row["kernel"],
                "sm_{}{}".format(*row["capability"]),
                "IB{images_per_block} BP{block_patches} w{num_warps} s{num_stages}".format(**setting),
                str(row["registers"]),
                f"{row['spill_loads']}/{row['spill_stores']}",
                f"{row['shared_bytes'] / 1024:.1f}",
                str(row["mma_sync"]),
                str(row["wgmma"]),
                str(row["async_copies"]),
                str(row["resident_programs"]),
                str(row["resident_w_rows"]),
                "; ".join(row["problems"]) or ("ships (W stream alone)" if row["kernel"] != "dual_forward" else ""),
            )
        )
    lines.append(grid(table))
    lines += ["", "Shape A (16 x 5 images), one layer forward, least work, key/value projection included:"]
    least = [("", "GFLOP", "MB")]
    least += [(k, f"{w['flops'] / 1e9:.1f}", f"{w['bytes'] / 1e6:.0f}") for k, w in result["least_work"].items()]
    lines.append(grid(least))
    lines += ["", "Shape A, what programs of both attentions compute (with padding) and load (memory or cache):"]
    work = [("", "IB", "GFLOP", "MB of keys and values loaded")]
    for images, ways in result["attention_work"].items():
        work += [(k, images, f"{w['flops'] / 1e9:.2f}", f"{w['loaded_bytes'] / 1e6:.0f}") for k, w in ways.items()]
    return "\n".join([*lines, grid(work), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.dual", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of dual-aot.json and dual-aot.txt")
    options = parser.parse_args(arguments)
    result = header()
    result["compiled"] = compiled()
    result["least_work"] = least_work(SHAPES["A"])
    result["attention_work"] = {str(images): attention_work(SHAPES["A"], images) for images in (1, 2, 4)}
    text = report_text(result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "dual-aot.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / "dual-aot.txt").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
