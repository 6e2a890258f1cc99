"""The Triton kernels of image mixing against float64, in the interpreter where there is no GPU.

bfloat16 runs here too: these kernels have no matrix products, which the interpreter gets wrong in that type.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from samtrain_kernels import image_mix_weights
from samtrain_kernels.image_mix import op
from samtrain_kernels.image_mix.reference import context_members, masked_softmax_reference
from samtrain_kernels.settings import SEARCH_SPACE, PatchSetting
from samtrain_kernels.testing import assert_accurate, disagreement, evaluate
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from samtrain.core.batch import ImageGroups

triton_kernels: ModuleType = pytest.importorskip("samtrain_kernels.image_mix.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = ("features", "score_weight", "logit_bias")
KINDS: Any = {"features": "gradient", "score_weight": "mix_gradient", "logit_bias": "mix_gradient"}


def drawn(counts: list[int], patches: int, width: int, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs whose logits have a standard deviation of about one."""
    generator = torch.Generator().manual_seed(seed)
    images = sum(counts)
    inputs = {
        "features": torch.randn(images, patches, width, generator=generator).to(dtype),
        "score_weight": torch.randn(width, generator=generator) * width**-0.5,
        "logit_bias": torch.randn(images, generator=generator),
    }
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def mix(counts: list[int], context: str, backend: str, **inputs: Any) -> Tensor:
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    return image_mix_weights(
        inputs["features"],
        inputs["score_weight"],
        inputs.get("score_bias"),
        groups,
        context=context,  # type: ignore[arg-type]
        logit_bias=inputs.get("logit_bias"),
        backend=backend,  # type: ignore[arg-type]
    )


def assert_triton_accurate(
    inputs: dict[str, Tensor | None], counts: list[int], context: str, *, wrt: tuple[str, ...] = INPUTS
) -> dict[str, Tensor]:
    """Weights and gradients of the Triton path by the rule of `samtrain_kernels.testing`; returns them."""
    contexts = sum(counts) if context == "others" else len(counts)
    features = inputs["features"]
    assert features is not None
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(contexts, max([1, *counts]), features.shape[1], generator=generator).to(DEVICE)
    run = partial(evaluate, inputs=inputs, output_gradient=gradient, wrt=wrt)
    got = run(partial(mix, counts, context, "triton"))
    eager = run(partial(mix, counts, context, "reference"))
    exact = run(partial(mix, counts, context, "reference"), dtype=torch.float64)
    assert_accurate(got, eager, exact, dtype=features.dtype, kinds=KINDS)
    return got


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", ["others", "all"])
@pytest.mark.parametrize(
    "counts,patches,width",
    [
        ([3, 1, 2], 17, 300),  # ragged; a ragged tile of patches and of columns; a sample of one image
        ([2], 1, 8),  # fewer patches and columns than any tile holds
        ([1, 1], 17, 64),  # only empty contexts with `others`
        ([0, 10, 0, 2], 9, 40),  # samples without images
    ],
)
def test_weights_and_all_gradients_against_float64(
    dtype: torch.dtype, context: str, counts: list[int], patches: int, width: int
) -> None:
    inputs: Any = drawn(counts, patches, width, dtype)
    got = assert_triton_accurate(inputs, counts, context)
    assert got["output"].dtype == torch.float32
    assert got["features"].dtype == dtype and got["score_weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "kernel,setting", [(k, s) for k in ("patch_logits", "patch_logits_grad") for s in SEARCH_SPACE[k]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_setting_of_the_search_space(kernel: str, setting: PatchSetting, dtype: torch.dtype) -> None:
    inputs = drawn([3], 37, 300, dtype)
    features, weight, gradient = inputs["features"], inputs["score_weight"], torch.randn(3, 37, device=DEVICE)
    wide = features.double()
    if kernel == "patch_logits":
        got = triton_kernels.patch_logits(features, weight, setting=setting)
        eager, exact = features.float() @ weight, wide @ weight.double()
    else:
        got = triton_kernels.score_weight_gradient(gradient, features, setting=setting)
        eager = gradient.reshape(-1) @ features.float().reshape(-1, 300)
        exact = gradient.double().reshape(-1) @ wide.reshape(-1, 300)
    # Sums of float32 products: the ceiling of float32 whatever the features are stored in.
    assert disagreement(got, eager, exact, kind="output", dtype=torch.float32) is None


def views_of(features: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    images, patches, width = features.shape
    padded = torch.full((images, patches + 3, 2, width + 16), float("nan"), dtype=features.dtype, device=DEVICE)
    padded[:, 1:-2, 1, :width] = features
    return {
        "packed": padded[:, 1:-2, 1, :width],
        "patches first": features.transpose(0, 1).contiguous().transpose(0, 1),
        "columns apart": features.transpose(1, 2).contiguous().transpose(1, 2),
    }


@pytest.mark.parametrize("num_splits", [1, 4, 64])
def test_the_sum_of_the_score_gradient_may_be_split_anyhow(num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 tiles: all in one split, several in each, fewer than splits."""
    monkeypatch.setattr(triton_kernels, "NUM_SPLITS", num_splits)
    features, gradient = torch.randn(3, 18, 20, device=DEVICE), torch.randn(3, 18, device=DEVICE)
    setting = PatchSetting(block_rows=4, block_columns=32, num_warps=4, num_stages=1)
    got = triton_kernels.score_weight_gradient(gradient, features, setting=setting)
    exact = torch.einsum("ip,ipc->c", gradient.double(), features.double())
    assert disagreement(got, exact.float(), exact, kind="output", dtype=torch.float32) is None


@pytest.mark.parametrize("layout", ["packed", "patches first", "columns apart"])
def test_strided_features_give_the_same_bits(layout: str) -> None:
    counts = [2, 3]
    inputs: Any = drawn(counts, 19, 72, torch.float16)
    view = views_of(inputs["features"])[layout]
    assert torch.equal(view, inputs["features"]) and view.stride() != inputs["features"].stride()
    expected = assert_triton_accurate(inputs, counts, "others")
    got = assert_triton_accurate(inputs | {"features": view}, counts, "others")
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_one_feature_map_expanded_over_the_images() -> None:
    features = torch.randn(1, 9, 40, device=DEVICE).expand(3, -1, -1)
    got = op.patch_logits(features, torch.ones(40, device=DEVICE))
    assert torch.equal(got[0], got[1]) and torch.allclose(got[0], features[0].sum(-1), atol=1e-5)


def test_offsets_beyond_two_to_the_31_elements() -> None:
    """Three images 1.1e9 elements apart: memory that nobody touches is never given by the system."""
    stride = 1_100_000_000
    try:
        memory = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    features = memory.as_strided((3, 4, 16), (stride, 16, 1))
    for image in range(3):
        features[image] = image + 1.0
    weight, gradient = torch.ones(16, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    assert triton_kernels.patch_logits(features, weight)[:, 0].tolist() == [16.0, 32.0, 48.0]
    assert triton_kernels.score_weight_gradient(gradient, features).tolist() == [24.0] * 16


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_overwhelming_image_leaves_the_others_exact(backend: str) -> None:
    """A gap of 40 between logits: 1 - a by subtraction gives NaN, the mask does not."""
    features = torch.zeros(3, 2, 8, device=DEVICE)
    features[0, :, 0] = 40.0
    weight = torch.eye(8, device=DEVICE)[0].requires_grad_()
    weights = mix([3], "others", backend, features=features, score_weight=weight)
    assert weights[0].tolist() == [[0.0, 0.0], [0.5, 0.5], [0.5, 0.5]]
    assert weights[1, 0].tolist() == [1.0, 1.0] and 0 < weights[1, 2, 0].item() < 1e-17
    weights.square().sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("context", ["others", "all"])
def test_large_logits_against_float64(context: str) -> None:
    inputs: Any = drawn([4, 2], 11, 64, torch.float16)
    inputs["score_weight"] = inputs["score_weight"] * 40
    assert_triton_accurate(inputs, [4, 2], context)


@pytest.mark.parametrize("context", ["others", "all"])
def test_identical_images_share_equally(context: str) -> None:
    features = torch.randn(1, 5, 24, device=DEVICE).expand(4, -1, -1)
    weights = mix([4], context, "triton", features=features, score_weight=torch.randn(24, device=DEVICE))
    shares = weights[weights > 0]
    assert torch.allclose(shares, torch.full_like(shares, 1 / 3 if context == "others" else 1 / 4), atol=1e-6)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("context", ["others", "all"])
def test_slots_that_a_context_does_not_read_are_exactly_zero(context: Any, backend: str) -> None:
    counts = [1, 4, 0, 2]
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    weights = mix(counts, context, backend, **drawn(counts, 6, 16, torch.float32))
    member = context_members(groups, context)
    assert not weights[~member].any()
    sums = weights.sum(1)
    assert torch.allclose(sums, member.any(1).to(sums)[:, None].expand_as(sums), atol=1e-6)


@pytest.mark.parametrize("context", ["others", "all"])
def test_a_gradient_at_an_unread_slot_goes_nowhere(context: Any) -> None:
    """An operation downstream may leave anything there, NaN included."""
    counts = [1, 3, 2]
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    inputs = drawn(counts, 4, 16, torch.float32)
    features = inputs["features"].requires_grad_()
    member = context_members(groups, context)
    results = []
    for left in (0.0, float("nan")):
        weights = mix(counts, context, "triton", **inputs)
        gradient = torch.arange(weights.numel(), device=DEVICE).reshape(weights.shape).sin()
        results += torch.autograd.grad(weights, features, gradient.masked_fill(~member[:, :, None], left))
    assert torch.isfinite(results[1]).all() and torch.equal(*results)


def test_two_images_with_others_have_constant_weights_and_zero_gradients() -> None:
    inputs: Any = drawn([2, 2], 5, 24, torch.float32)
    got = assert_triton_accurate(inputs, [2, 2], "others")
    assert got["output"].unique().tolist() == [0.0, 1.0]
    assert not got["features"].any() and not got["score_weight"].any()


def test_only_asked_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen features (the usual case) get no gradient tensor; a frozen adjustment runs no kernel backwards."""
    calls = []
    original = triton_kernels.score_weight_gradient
    monkeypatch.setattr(triton_kernels, "score_weight_gradient", lambda *a: (calls.append(a), original(*a))[1])
    inputs: Any = drawn([3], 5, 24, torch.float32)
    assert_triton_accurate(inputs, [3], "all", wrt=("score_weight",))
    assert len(calls) == 1
    assert_triton_accurate(inputs, [3], "all", wrt=("features",))
    assert len(calls) == 1
    gradient = torch.ones(3, 5, device=DEVICE)
    features, weight = op.patch_logits_backward(gradient, inputs["features"], inputs["score_weight"], False, False)
    assert features.numel() == weight.numel() == 0


@pytest.mark.parametrize("context", ["others", "all"])
def test_twenty_runs_give_the_same_bits(context: str) -> None:
    inputs = drawn([3, 1], 9, 40, torch.float16)
    gradient = torch.randn(4 if context == "others" else 2, 3, 9, device=DEVICE)
    runs = [evaluate(partial(mix, [3, 1], context, "triton"), inputs, gradient, wrt=INPUTS) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in runs[0])


@pytest.mark.parametrize("patches,images", [(0, 2), (3, 0)])
def test_nothing_to_score(patches: int, images: int) -> None:
    features, weight = torch.zeros(images, patches, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    assert op.patch_logits(features, weight).shape == (images, patches)
    gradient = torch.zeros(images, patches, device=DEVICE)
    assert triton_kernels.score_weight_gradient(gradient, features).tolist() == [0.0] * 8


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_does_not_reach_in(backend: str) -> None:
    inputs = drawn([3, 2], 7, 40, torch.float32)
    gradient = torch.randn(5, 3, 7, device=DEVICE)
    run = partial(evaluate, partial(mix, [3, 2], "others", backend), inputs, gradient, wrt=INPUTS)
    expected = run()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_without_triton_the_operation_runs_the_reference_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("CUDA tensors always run the kernels")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delattr(triton_kernels, "patch_logits")
    monkeypatch.delattr(triton_kernels, "score_weight_gradient")
    inputs: Any = drawn([3, 2], 7, 40, torch.bfloat16)
    assert_triton_accurate(inputs, [3, 2], "others")
    with torch.autocast("cpu", torch.bfloat16):
        assert_triton_accurate(inputs, [3, 2], "others")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"context": "both"}, "context 'both' is unknown; choose others or all"),
        ({"backend": "auto"}, "backend 'auto' is unknown to image_mix_weights"),
        ({"score_weight": torch.ones(7)}, r"features \(3, 4, 8\) and score_weight \(7,\) must be"),
        ({"logit_bias": torch.ones(2)}, r"logit_bias \(2,\) must be \[I\] = \[3\]"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.ones(3, 4, 8), "score_weight": torch.ones(8), "logit_bias": torch.ones(3),
        "context": "all", "backend": "reference",
    } | changes  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mix([3], arguments.pop("context"), arguments.pop("backend"), **arguments)


# What PyTorch has to know of the operations.


def test_operations_pass_opcheck_forward_and_backward() -> None:
    forward = torch.ops.samtrain_kernels.patch_logits.default
    backward = torch.ops.samtrain_kernels.patch_logits_backward.default
    inputs = drawn([2], 3, 24, torch.float16)
    features, weight = inputs["features"], inputs["score_weight"]
    gradient = torch.randn(2, 3, device=DEVICE)
    # As they are, and as parts of larger tensors.
    for f, w, g in ((features, weight, gradient), (features[:, 1:, :16], weight[:16], gradient[:, 1:])):
        torch.library.opcheck(forward, (f.clone(memory_format=torch.preserve_format).requires_grad_(), w))
        torch.library.opcheck(forward, (f.detach().requires_grad_(), w.detach().requires_grad_()))
        for needs in ((True, True), (False, True), (False, False)):
            torch.library.opcheck(backward, (g, f.detach(), w.detach(), *needs))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("context", ["others", "all"])
def test_gradcheck(context: str, backend: str) -> None:
    if DEVICE == "cuda":
        pytest.skip("float64 runs in the interpreter alone")
    inputs = drawn([3, 1, 2], 2, 5, torch.float64)
    tensors = [inputs[name].double().requires_grad_() for name in INPUTS] + [torch.ones((), dtype=torch.float64)]

    def function(*values: Tensor) -> Tensor:
        return mix([3, 1, 2], context, backend, **dict(zip((*INPUTS, "score_bias"), values, strict=True)))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_compiles_whole_with_dynamic_shapes() -> None:
    """Inductor, one graph for batches of any size (a graph of its own for one image, one patch: PyTorch's rule)."""

    def function(features: Tensor, weight: Tensor, bias: Tensor, groups: Any) -> Tensor:
        weights = image_mix_weights(
            features * 2, weight, None, groups, context="others", logit_bias=bias, backend="triton"
        )
        return weights + 1  # something for Inductor on both sides of the operation

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for number, (counts, patches) in enumerate([([2, 3], 6), ([4, 2, 5], 7)]):
        inputs = drawn(counts, patches, 24, torch.float32)
        groups = ImageGroups.from_counts(counts).to(DEVICE)
        gradient = torch.randn(sum(counts), max(counts), patches, device=DEVICE)
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            got = evaluate(partial(compiled, groups=groups), renamed(inputs), gradient, wrt=("features", "weight"))
        expected = evaluate(partial(function, groups=groups), renamed(inputs), gradient, wrt=("features", "weight"))
        for name in expected:
            assert torch.allclose(got[name], expected[name], rtol=1e-5, atol=1e-6), name


def renamed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("features", "weight", "bias"), inputs.values(), strict=True))


def test_checkpointing_recomputes_to_the_same_bits_and_a_policy_can_keep_the_logits() -> None:
    inputs = drawn([3, 2], 7, 40, torch.float32)
    gradient = torch.randn(5, 3, 7, device=DEVICE)
    names, plain = list(inputs), partial(mix, [3, 2], "others", "triton")
    expected = evaluate(plain, inputs, gradient, wrt=INPUTS)
    seen = []

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_ours = operation == torch.ops.samtrain_kernels.patch_logits.default
        seen.append(is_ours)
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    selective = partial(create_selective_checkpoint_contexts, policy)
    for options in ({}, {"context_fn": selective}):

        def recomputed(options: Any = options, **values: Any) -> Tensor:
            return checkpoint(
                lambda *tensors: plain(**dict(zip(names, tensors))), *values.values(), use_reentrant=False, **options
            )

        got = evaluate(recomputed, inputs, gradient, wrt=INPUTS)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(seen)


# Planted bugs: each is one line of the kernels, and each must be seen.

LOGIT_BUGS = {
    "the first image for all": ("(tl.program_id(0) // blocks).to(tl.int64)", "(tl.program_id(0) * 0).to(tl.int64)"),
    "first columns skipped": ("tl.range(0, width,", "tl.range(BLOCK_COLUMNS, width,"),
    "last columns skipped": ("tl.range(0, width,", "tl.range(0, width - BLOCK_COLUMNS,"),
    "sum overwritten": ("total += tile.to(WIDE) * weight", "total = tile.to(WIDE) * weight"),
    "weights missing": ("tile.to(WIDE) * weight.to(WIDE)[None, :]", "tile.to(WIDE)"),
    "products in half precision": (
        "tile.to(WIDE) * weight.to(WIDE)[None, :]", "(tile * weight.to(tile.dtype)[None, :]).to(WIDE)",
    ),
    "tail of columns unmasked": (
        "is_column = columns < width\n        tile", "is_column = columns <= width\n        tile",
    ),
    "blocks start one patch late": ("% blocks) * BLOCK_ROWS + tl", "% blocks) * BLOCK_ROWS + 1 + tl"),
    "tail of patches not written": ("axis=1), mask=is_patch)", "axis=1), mask=patches < num_patches - 1)"),
    "weights of another stride": ("score_weight.contiguous()", "score_weight"),
}  # fmt: skip
GRADIENT_BUGS = {
    "the first image for all": ("(tile_index // tiles_of_image).to(tl.int64)", "(tiles_of_image * 0).to(tl.int64)"),
    "a split sums the tiles of the others": ("tl.range(split, num_tiles,", "tl.range(0, num_tiles,"),
    "tiles missing": ("tl.range(split, num_tiles, num_splits", "tl.range(split, num_tiles - 1, num_splits"),
    "tiles twice": ("tl.range(split, num_tiles, num_splits", "tl.range(split, num_tiles, num_splits - 1"),
    "sum overwritten": ("total += tile.to(WIDE) * gradient", "total = tile.to(WIDE) * gradient"),
    "partial sums overwritten": ("partial_ptr + split.to(tl.int64) * width", "partial_ptr + 0 * width"),
    "tail of patches unmasked": (
        "is_patch = patches < num_patches\n        gradient", "is_patch = patches <= num_patches\n        gradient",
    ),
    "gradient of another image": ("gradient_ptr + image * num_patches", "gradient_ptr"),
    "gradient of another stride": ("gradient.contiguous()", "gradient"),
    "products in half precision": (
        "tile.to(WIDE) * gradient.to(WIDE)[:, None]", "(tile * gradient.to(tile.dtype)[:, None]).to(WIDE)",
    ),
    "a partial sum dropped": ("partial.sum(0)", "partial[1:].sum(0)"),
}  # fmt: skip
SOFTMAX_BUGS = {
    "projection missing": ("(gradient - (weights * gradient).sum(1, keepdim=True))", "gradient"),
    "sum over patches": (".sum(1, keepdim=True)", ".sum(2, keepdim=True)"),
    "sum over slots, not contexts": ("[:, :, None, None], 0.0).sum(1)", "[:, :, None, None], 0.0).sum(2)"),
    "contexts beyond the sample counted": (
        "by_group.masked_fill(~groups.valid[:, :, None, None], 0.0).sum(1)", "by_group.sum(1)",
    ),
    "unread slots pass NaN": (
        "gradient = gradient.masked_fill(~context_members(groups, ctx.context)[:, :, None], 0.0)", "pass",
    ),
    "others like all": ('if ctx.context == "others":', "if False:"),
}  # fmt: skip
REFERENCE_BUGS = {
    "empty contexts not zero": (".softmax(dim=1) * member", ".softmax(dim=1)"),
    "the own image read": (" & (slots != groups.slot_of_image[:, None])", ""),
    "softmax over patches": (".softmax(dim=1)", ".softmax(dim=2)"),
    "images beyond the sample read": ("return groups.valid\n", "return torch.ones_like(groups.valid)\n"),
    "groups mixed up": ("logits[groups.images_of_group]", "logits[groups.images_of_group.flip(0)]"),
}


def kernel_errors(module: ModuleType) -> list[str]:
    """What is wrong with the patch kernels of a module, on tensors that are parts of larger ones without zeros."""
    setting = PatchSetting(block_rows=4, block_columns=16, num_warps=1, num_stages=1)
    module.NUM_SPLITS = 4  # type: ignore[attr-defined]  # 6 tiles: some splits have two, some one
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 9, 3, 45, generator=generator).half()[:, 1:8, 1, :37]  # [3, 7, 37]
    weights = torch.randn(2, 40, generator=generator)[:, :37]
    gradient = torch.randn(7, 3, generator=generator).T
    wide = features.double()
    strided = weights.T.contiguous()[:, 1]
    results = [
        (module.patch_logits(features, weights[0], setting=setting), wide @ weights[0].double()),
        (module.patch_logits(features, strided, setting=setting), wide @ strided.double()),
        (
            module.score_weight_gradient(gradient, features, setting=setting),
            torch.einsum("ip,ipc->c", gradient.double(), wide),
        ),
    ]
    found = [disagreement(got, exact.float(), exact, kind="output", dtype=torch.float32) for got, exact in results]
    return [why for why in found if why is not None]


def softmax_errors(module: ModuleType) -> list[str]:
    """What is wrong with the backward of a module's masked softmax."""
    found = []
    groups: Any = ImageGroups.from_counts([3, 1, 2])
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for context in ("others", "all"):
        member = context_members(groups, context)[:, :, None]
        results = []
        for function, left in ((module.masked_softmax, float("nan")), (masked_softmax_reference, 0.0)):
            leaf = logits.clone().requires_grad_()
            weights = function(leaf, groups, context=context)
            gradient = torch.arange(weights.numel(), dtype=torch.float64).reshape(weights.shape).sin()
            results += torch.autograd.grad(weights, leaf, gradient.masked_fill(~member, left))
        got, expected = results
        why = disagreement(got, expected, expected, kind="gradient", dtype=torch.float64)
        found += [why] if why else []
    return found


def reference_errors(module: ModuleType) -> list[str]:
    """What is wrong with the weights of a module's reference, by a loop over contexts."""
    found, counts = [], [3, 1, 2]
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for context in ("others", "all"):
        rows, start = [], 0
        for count in counts:
            for own in range(count) if context == "others" else [None]:
                row = torch.zeros(3, 2, dtype=torch.float64)
                members = [slot for slot in range(count) if slot != own]
                if members:
                    row[members] = logits[start:][members].softmax(0)
                rows.append(row)
            start += count
        got, exact = module.masked_softmax_reference(logits, ImageGroups.from_counts(counts), context=context), rows
        why = disagreement(got, torch.stack(exact), torch.stack(exact), kind="output", dtype=torch.float64)
        found += [why] if why else []
    return found


SUBJECTS: dict[str, tuple[str, Callable[[ModuleType], list[str]], dict[str, tuple[str, str]]]] = {
    "logits": ("samtrain_kernels.image_mix.triton", kernel_errors, LOGIT_BUGS),
    "gradient": ("samtrain_kernels.image_mix.triton", kernel_errors, GRADIENT_BUGS),
    "softmax": ("samtrain_kernels.image_mix.softmax", softmax_errors, SOFTMAX_BUGS),
    "reference": ("samtrain_kernels.image_mix.reference", reference_errors, REFERENCE_BUGS),
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("subject,bug", [(name, bug) for name, (_, _, bugs) in SUBJECTS.items() for bug in bugs])
@pytest.mark.skipif(DEVICE == "cuda", reason="planted bugs read out of bounds, which only the interpreter survives")
def test_a_planted_bug_is_seen(subject: str, bug: str, mutant: Callable[..., ModuleType]) -> None:
    name, errors, bugs = SUBJECTS[subject]
    module = __import__(name, fromlist=["_"])
    assert errors(module) == []
    assert errors(mutant(module, *bugs[bug])) != []
