"""Patch logits and their gradients in one read of the features each, in Triton.

Legend: I images, P patches, C width, BR and BC rows and columns of a tile.

    logits[i, p] = sum_c F[i, p, c] w[c]           one program: BR patches of one image, all of C in chunks of BC
    dw[c]        = sum_{i, p} de[i, p] F[i, p, c]   in two stages: many programs sum over some tiles of rows each and
                                                    write partial sums, PyTorch adds those in a fixed order (no atomics)

Both are bound by reading F: no tensor cores, products and sums in float32 (float64 for float64 features, which the
interpreter alone runs). Offsets are int64, every load has a mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from samtrain_kernels.aot import AotCase
from samtrain_kernels.image_mix.reference import wide_dtype
from samtrain_kernels.settings import PatchKernel, PatchSetting, gpu_of, setting_for

# Row splits of dw. A number of its own and not of the GPU's: the sum, and so its rounding, is the same everywhere.
# 64 splits x 11 column blocks (C = 1408, BC = 128) are 704 programs.
NUM_SPLITS = 64


@triton.jit
def patch_logits_kernel(
    features_ptr,
    weight_ptr,
    logits_ptr,
    num_patches,
    width,
    stride_image,
    stride_patch,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: I * ceil(P / BR). features [I, P, C] strided, weight [C] contiguous, logits [I, P] contiguous."""
    blocks = tl.cdiv(num_patches, BLOCK_ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    patches = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_patch = patches < num_patches
    rows = features_ptr + image * stride_image + patches.to(tl.int64)[:, None] * stride_patch  # [BR, 1]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], WIDE)
    for start in tl.range(0, width, BLOCK_COLUMNS, num_stages=NUM_STAGES):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = columns < width
        tile = tl.load(rows + columns[None, :], mask=is_patch[:, None] & is_column[None, :], other=0.0)
        weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0)
        total += tile.to(WIDE) * weight.to(WIDE)[None, :]
    tl.store(logits_ptr + image * num_patches + patches, tl.sum(total, axis=1), mask=is_patch)


@triton.jit(do_not_specialize=["num_tiles", "num_splits"])
def patch_logits_grad_kernel(
    features_ptr,
    gradient_ptr,
    partial_ptr,
    num_tiles,
    num_splits,
    num_patches,
    width,
    stride_image,
    stride_patch,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: (splits, ceil(C / BC)). gradient [I, P] contiguous, partial [splits, C] contiguous.

    A tile is BR patches of one image; split s sums over the tiles s, s + splits, s + 2 splits, ...
    """
    split = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < width
    tiles_of_image = tl.cdiv(num_patches, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], WIDE)
    for tile_index in tl.range(split, num_tiles, num_splits, num_stages=NUM_STAGES):
        image = (tile_index // tiles_of_image).to(tl.int64)
        patches = (tile_index % tiles_of_image) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_patch = patches < num_patches
        gradient = tl.load(gradient_ptr + image * num_patches + patches, mask=is_patch, other=0.0)
        rows = features_ptr + image * stride_image + patches.to(tl.int64)[:, None] * stride_patch  # [BR, 1]
        tile = tl.load(rows + columns[None, :], mask=is_patch[:, None] & is_column[None, :], other=0.0)
        total += tile.to(WIDE) * gradient.to(WIDE)[:, None]
    tl.store(partial_ptr + split.to(tl.int64) * width + columns, tl.sum(total, axis=0), mask=is_column)


def patch_logits(features: Tensor, score_weight: Tensor, *, setting: PatchSetting | None = None) -> Tensor:
    """w . F: [I, P, C] (last stride 1) and [C] -> [I, P], float32 (float64 for float64 features)."""
    num_images, num_patches, width = features.shape
    wide = wide_dtype(features.dtype)
    logits = torch.empty(num_images, num_patches, dtype=wide, device=features.device)
    if features.numel() == 0:
        return logits.zero_()
    setting = setting or _setting("patch_logits", features)
    with torch.cuda.device_of(features):
        patch_logits_kernel[(num_images * triton.cdiv(num_patches, setting.block_rows),)](
            features,
            score_weight.contiguous(),
            logits,
            num_patches,
            width,
            features.stride(0),
            features.stride(1),
            WIDE=_TRITON_DTYPE[wide],
            BLOCK_ROWS=setting.block_rows,
            BLOCK_COLUMNS=setting.block_columns,
            NUM_STAGES=setting.num_stages,
            **setting.options,
        )
    return logits


def score_weight_gradient(gradient: Tensor, features: Tensor, *, setting: PatchSetting | None = None) -> Tensor:
    """dw [C] in float32 (float64), from de [I, P] and the features [I, P, C] (last stride 1)."""
    num_images, num_patches, width = features.shape
    wide = wide_dtype(features.dtype)
    if features.numel() == 0:
        return torch.zeros(width, dtype=wide, device=features.device)
    setting = setting or _setting("patch_logits_grad", features)
    num_tiles = num_images * triton.cdiv(num_patches, setting.block_rows)
    num_splits = min(NUM_SPLITS, num_tiles)
    partial = torch.empty(num_splits, width, dtype=wide, device=features.device)
    with torch.cuda.device_of(features):
        patch_logits_grad_kernel[(num_splits, triton.cdiv(width, setting.block_columns))](
            features,
            gradient.contiguous(),
            partial,
            num_tiles,
            num_splits,
            num_patches,
            width,
            features.stride(0),
            features.stride(1),
            WIDE=_TRITON_DTYPE[wide],
            BLOCK_ROWS=setting.block_rows,
            BLOCK_COLUMNS=setting.block_columns,
            NUM_STAGES=setting.num_stages,
            **setting.options,
        )
    return partial.sum(0)


def aot_cases(kernel: PatchKernel, setting: PatchSetting, *, dtype: torch.dtype) -> list[AotCase]:
    """The kernel as it is compiled for contiguous features whose width is a multiple of 16."""
    element = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    constexprs: dict[str, Any] = {
        "WIDE": tl.float32,
        "BLOCK_ROWS": setting.block_rows,
        "BLOCK_COLUMNS": setting.block_columns,
        "NUM_STAGES": setting.num_stages,
    }
    if kernel == "patch_logits":
        function = patch_logits_kernel
        types = {"features_ptr": element, "weight_ptr": "*fp32", "logits_ptr": "*fp32"}
    else:
        function = patch_logits_grad_kernel
        types = {"features_ptr": element, "gradient_ptr": "*fp32", "partial_ptr": "*fp32"}
        types |= {"num_tiles": "i32", "num_splits": "i32"}
    types |= dict.fromkeys(("num_patches", "width", "stride_image", "stride_patch"), "i32")
    divisible = (*(name for name in types if name.endswith("_ptr")), "width", "stride_image", "stride_patch")
    signature = types | dict.fromkeys(constexprs, "constexpr")
    return [AotCase(kernel, setting, function, signature, constexprs, divisible_by_16=divisible)]


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _setting(kernel: PatchKernel, features: Tensor) -> PatchSetting:
    device_name, capability = gpu_of(features.device)
    return setting_for(kernel, dtype=features.dtype, device_name=device_name, capability=capability)
