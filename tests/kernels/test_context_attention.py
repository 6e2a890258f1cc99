"""Context attention: the kernels against a loop over images in float64, in the interpreter where there is no GPU.

bfloat16 needs a GPU: the interpreter multiplies its bit patterns.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from samtrain_kernels import context_attention
from samtrain_kernels.context_attention.reference import AttentionInputs
from samtrain_kernels.image_mix.reference import context_members
from samtrain_kernels.settings import SEARCH_SPACE, KernelSetting
from samtrain_kernels.testing import assert_accurate, evaluate
from torch import Tensor

from samtrain.core.batch import ImageGroups

pytestmark = pytest.mark.usefixtures("quick_interpreter")
kernels: ModuleType = pytest.importorskip("samtrain_kernels.context_attention.triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WRT = ("query", "key", "value", "weights")
BIASES = ("key_bias", "value_bias")
KINDS: Any = dict.fromkeys(("query", "key", "value"), "gradient") | dict.fromkeys(("weights", *BIASES), "mix_gradient")


def drawn(
    counts: list[int],
    patches: int,
    *,
    context: str = "others",
    queries: str = "image",
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    num_queries: int = 8,
    width: int = 16,
    bias: bool = False,
) -> dict[str, Any]:
    """Keys and values are views of one packed tensor. The weights do not sum to one: the op does not rely on it."""
    generator = torch.Generator().manual_seed(0)
    images, groups = sum(counts), len(counts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    key, value = normal(images, patches, 2, heads, width).to(dtype).unbind(2)
    contexts = images if context == "others" else groups
    weights = normal(contexts, max(1, *counts), patches).softmax(1) * (0.7 + 0.3 * normal(contexts, 1, patches).tanh())
    inputs: dict[str, Any] = {
        "query": normal(images if queries == "image" else groups, num_queries, heads, width).to(dtype),
        "key": key,
        "value": value,
        "weights": weights,
        "key_bias": normal(images, heads, width).to(dtype) if bias else None,
        "value_bias": normal(images, heads, width).to(dtype) if bias else None,
    }
    return inputs


def by_loop(
    counts: list[int], context: str, queries: str, scale: float = 0.3, *,
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, key_bias: Any = None, value_bias: Any = None,
) -> Tensor:  # fmt: skip
    """The definition, image by image: plain attention to keys and values mixed in the precision of the inputs."""
    outputs, first = [], 0
    if key_bias is not None:
        key, value = key + key_bias[:, None], value + value_bias[:, None]
    for group, count in enumerate(counts):
        for slot in range(count if queries == "image" else 1):
            row = first + slot if queries == "image" else group
            a = weights[first + slot if context == "others" else group]
            mixed_key, mixed_value = torch.zeros_like(key[0]), torch.zeros_like(value[0])
            for j in range(count):
                if context == "all" or j != slot:
                    share = a[j].to(key.dtype)[:, None, None]
                    mixed_key = mixed_key + share * key[first + j]
                    mixed_value = mixed_value + share * value[first + j]
            scores = torch.einsum("qhd,phd->hqp", query[row], mixed_key)
            wide = torch.promote_types(scores.dtype, torch.float32)
            p = (scores.to(wide) * scale).softmax(-1).to(query.dtype)
            outputs.append(torch.einsum("hqp,phd->qhd", p, mixed_value))
        first += count
    return torch.stack(outputs) if outputs else query * 0


def attend(counts: list[int], context: Any, queries: Any, backend: Any = "triton", **inputs: Any) -> Tensor:
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    query, key, value, weights = (inputs.pop(name) for name in WRT)
    return context_attention(
        query, key, value, weights, groups, context=context, queries=queries, scale=0.3, backend=backend, **inputs
    )


def output_gradient(inputs: dict[str, Any]) -> Tensor:
    """A slice of a larger gradient, as the concatenation of two streams leaves it."""
    query = inputs["query"]
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(query.shape[0] + 2, query.shape[1] + 1, *query.shape[2:], generator=generator)
    return both.to(query.dtype).to(DEVICE)[1:-1, 1:]


def assert_kernels_accurate(
    inputs: dict[str, Any], counts: list[int], context: str = "others", queries: str = "image", *,
    run: Callable[..., dict[str, Tensor]] | None = None, wrt: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Output and all gradients by the rule of `samtrain_kernels.testing`; returns them."""
    asked = wrt or (WRT + BIASES if inputs["key_bias"] is not None else WRT)
    gradient = output_gradient(inputs)
    loop = partial(evaluate, partial(by_loop, counts, context, queries), inputs, gradient, wrt=asked)
    eager, exact = loop(), loop(dtype=torch.float64)
    operation = partial(evaluate, partial(attend, counts, context, queries), inputs, gradient, wrt=asked)
    got = (run or operation)()
    assert_accurate(got, eager, exact, dtype=inputs["query"].dtype, kinds=KINDS)
    return got


def direct(
    module: ModuleType, inputs: dict[str, Any], counts: list[int], context: Any, queries: Any,
    setting: KernelSetting, kv_setting: KernelSetting | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """All gradients by the launches of a module, at a setting."""
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    x = AttentionInputs(**inputs, groups=groups, context=context, queries=queries, scale=0.3)
    output, lse = module.forward(x, setting=setting)
    names = WRT + BIASES if inputs["key_bias"] is not None else WRT
    needs = [name in names for name in WRT + BIASES]
    kv_setting = kv_setting or replace(setting, images_per_block=1)
    gradients = module.backward(x, output_gradient(inputs), output, lse, needs, setting=setting, kv_setting=kv_setting)
    return {"output": output, **dict(zip(names, gradients, strict=True))}


F16, F32 = torch.float16, torch.float32


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "counts,patches,context,queries,dtype,bias",
    [
        ([1, 2, 5, 10], 17, "others", "image", F16, False),
        ([2, 0, 3], 65, "others", "image", F32, True),
        ([3, 1], 50, "all", "image", F32, True),
        ([5, 1, 2], 33, "all", "image", F16, False),
        ([2, 0, 3], 33, "all", "group", F16, True),
        ([1, 0], 64, "all", "group", F32, False),
    ],
)
def test_output_and_all_gradients_against_float64(
    counts: list[int], patches: int, context: str, queries: str, dtype: torch.dtype, bias: bool
) -> None:
    heads = 1 if max(counts) > 5 else 2  # the interpreter takes seconds for each
    inputs = drawn(counts, patches, context=context, queries=queries, dtype=dtype, bias=bias, heads=heads)
    got = assert_kernels_accurate(inputs, counts, context, queries)
    assert got["output"].dtype == got["key"].dtype == dtype and got["weights"].dtype == torch.float32


@pytest.mark.usefixtures("poison")
def test_a_single_patch() -> None:
    """Its softmax is one whatever the query, so the gradients of queries and keys are rounding around zero."""
    inputs = drawn([1, 3], 1, bias=True)
    assert_kernels_accurate(inputs, [1, 3], wrt=("value", "weights", "value_bias"))
    operation = partial(attend, [1, 3], "others", "image")
    got = evaluate(operation, inputs, output_gradient(inputs), wrt=("query", "key", "key_bias"))
    assert all(got[name].abs().max() < 1e-5 for name in ("query", "key", "key_bias"))


def tiles(kernel: str) -> list[tuple[int, int]]:
    """What of a setting the interpreter can tell apart: (query sets, patches)."""
    found = {(s.images_per_block, s.block_patches) for s in SEARCH_SPACE[kernel] if isinstance(s, KernelSetting)}
    return sorted(found)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("tile", sorted({*tiles("context_forward"), *tiles("context_backward")}))
def test_every_tile_of_the_search_space(tile: tuple[int, int], dtype: torch.dtype) -> None:
    """One patch more than a tile: a ragged tile and a full one. Fewer queries than rows, a block that is not full."""
    counts = [3]
    inputs = drawn(counts, tile[1] + 1, dtype=dtype, heads=1, bias=dtype == F16)
    setting = KernelSetting(*tile, num_warps=4, num_stages=2)
    assert_kernels_accurate(inputs, counts, run=lambda: direct(kernels, inputs, counts, "others", "image", setting))


def test_the_tiles_of_keys_and_values_are_among_those_tested() -> None:
    tested = {patches for _, patches in {*tiles("context_forward"), *tiles("context_backward")}}
    assert {patches for _, patches in tiles("context_kv_grad")} <= tested


def test_queries_fill_their_rows() -> None:
    inputs = drawn([2, 1], 20, num_queries=16, heads=1, width=32, dtype=F16)
    assert_kernels_accurate(inputs, [2, 1])


@pytest.mark.parametrize("context,queries", [("others", "image"), ("all", "image"), ("all", "group")])
def test_the_reference_is_the_loop(context: str, queries: str) -> None:
    counts = [2, 0, 3, 1]
    inputs = drawn(counts, 7, context=context, queries=queries, bias=True)
    inputs = {name: value.double() for name, value in inputs.items()}
    gradient = output_gradient(inputs)
    exact = evaluate(partial(by_loop, counts, context, queries), inputs, gradient, wrt=WRT + BIASES)
    if queries == "group":
        assert not exact["output"][1].any()
    for backend in ("reference", "triton"):  # float64: the operation's own backward formulas
        got = evaluate(partial(attend, counts, context, queries, backend), inputs, gradient, wrt=WRT + BIASES)
        for name, value in exact.items():
            assert (got[name] - value).abs().max() < 1e-12, (backend, name)


# Inputs that break attention kernels


def overwhelming_image(inputs: dict[str, Any]) -> None:
    """Weights from logits 40 apart."""
    logits = torch.zeros_like(inputs["weights"])
    logits[:, 0] = 40.0
    inputs["weights"] = logits.softmax(1)


def one_patch(inputs: dict[str, Any], patch: int) -> None:
    """All attention goes to one patch."""
    query = inputs["query"]
    inputs["query"] = torch.ones_like(query) * 4
    inputs["key"] = inputs["key"] * 0.1
    inputs["key"][:, patch] = 8.0


def identical_images(inputs: dict[str, Any]) -> None:
    for name in ("key", "value"):
        inputs[name] = inputs[name][:1].expand(inputs[name].shape[0], -1, -1, -1)


def large_queries(inputs: dict[str, Any]) -> None:
    inputs["query"] = inputs["query"] * 50


def strided(inputs: dict[str, Any]) -> None:
    """Views into memory full of NaN; one tensor with its last axis far apart."""
    for name in ("query", "key", "value"):
        x = inputs[name]
        memory = torch.full((x.shape[0], x.shape[1] + 2, 3, x.shape[2], x.shape[3] + 8), float("nan")).to(x)
        memory[:, 1:-1, 1, :, :-8] = x
        inputs[name] = memory[:, 1:-1, 1, :, :-8]
    inputs["value"] = inputs["value"].transpose(1, 3).contiguous().transpose(1, 3)


ADVERSARIAL: dict[str, Callable[[dict[str, Any]], None]] = {
    "logits 40 apart": overwhelming_image,
    "attention to the first patch": partial(one_patch, patch=0),
    "attention to the last patch": partial(one_patch, patch=-1),
    "identical images": identical_images,
    "queries times 50": large_queries,
    "strided": strided,
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_adversarial_inputs(name: str, dtype: torch.dtype) -> None:
    counts = [3]
    inputs = drawn(counts, 33, dtype=dtype, heads=1)
    ADVERSARIAL[name](inputs)
    if name == "attention to the last patch" or name == "attention to the first patch":
        # A saturated softmax: gradients of queries and keys are differences that cancel.
        assert_kernels_accurate(inputs, counts, wrt=("value",))
    elif name == "queries times 50":
        # Scores of about 1000: rounding of the scores themselves, in every precision, is far above the ceilings.
        exact = by_loop(counts, "others", "image", **{n: x if x is None else x.double() for n, x in inputs.items()})
        eager = by_loop(counts, "others", "image", **inputs)
        got = attend(counts, "others", "image", **inputs)
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-5
    else:
        assert_kernels_accurate(inputs, counts)


@pytest.mark.usefixtures("poison")
def test_an_empty_context_gives_exact_zeros() -> None:
    inputs = drawn([1, 1], 20, dtype=F16, bias=True)
    got = evaluate(partial(attend, [1, 1], "others", "image"), inputs, output_gradient(inputs), wrt=WRT + BIASES)
    assert all(not value.any() for value in got.values())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("context,queries", [("others", "image"), ("all", "image")])
def test_slots_that_a_context_does_not_read_are_dead(context: Any, queries: str, backend: str) -> None:
    """Whatever their weights are, nothing changes and their gradient is exactly zero."""
    counts = [1, 3]
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    dead = ~context_members(groups, context)
    inputs = drawn(counts, 18, context=context, queries=queries, heads=1)
    gradient = output_gradient(inputs)
    results = []
    for left in (0.0, 1e3):
        weights = inputs["weights"].masked_fill(dead[:, :, None], left)
        results.append(
            evaluate(
                partial(attend, counts, context, queries, backend), inputs | {"weights": weights}, gradient, wrt=WRT
            )
        )
    assert dead.any() and not results[0]["weights"][dead].any()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_lse_is_the_logarithm_of_the_sum_in_base_two() -> None:
    counts = [3]
    inputs = drawn(counts, 33, dtype=F16)
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    x = AttentionInputs(**inputs, groups=groups, context="others", queries="image", scale=0.3)
    mixed = torch.einsum(
        "knp,nphd->kphd", (inputs["weights"] * context_members(groups, "others")[:, :, None]).double(),
        inputs["key"].double(),
    )  # fmt: skip
    scores = torch.einsum("kqhd,kphd->khqp", inputs["query"].double(), mixed) * 0.3
    exact = scores.logsumexp(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert (kernels.forward(x)[1] - exact).abs().max() < 1e-5


def test_runs_repeat_bit_by_bit() -> None:
    counts = [3, 1]
    inputs = drawn(counts, 18, dtype=F16, bias=True, heads=1)
    run = partial(
        evaluate, partial(attend, counts, "others", "image"), inputs, output_gradient(inputs), wrt=WRT + BIASES
    )
    first = run()
    for _ in range(20 if DEVICE == "cuda" else 2):
        again = run()
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_frozen_keys_and_values_start_no_kernel_and_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel for the gradients of frozen keys and values")

    monkeypatch.setattr(kernels, "_kv_grad_launch", refuse)
    monkeypatch.setattr(kernels._Scratch, "of", refuse)
    inputs = drawn([3], 18, heads=1)
    assert_kernels_accurate(inputs, [3], wrt=("query", "weights"))
    monkeypatch.undo()
    for wrt in (("key",), ("value", "query")):
        assert_kernels_accurate(inputs, [3], wrt=wrt)


def test_biases_train_while_keys_and_values_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kv_grad_launch", None)
    inputs = drawn([3], 18, heads=1, bias=True)
    assert_kernels_accurate(inputs, [3], wrt=("weights", "key_bias", "value_bias"))


def test_a_batch_without_images() -> None:
    groups: Any = ImageGroups.from_counts([0, 0]).to(DEVICE)
    key = torch.zeros(0, 9, 2, 16, device=DEVICE)
    query = torch.randn(2, 4, 2, 16, device=DEVICE, requires_grad=True)
    weights = torch.zeros(2, 1, 9, device=DEVICE)
    output = context_attention(query, key, key, weights, groups, context="all", queries="group", backend="triton")
    output.sum().backward()
    assert not output.any() and query.grad is not None and not query.grad.any()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"context": "both"}, "context 'both' is unknown"),
        ({"queries": "group"}, "queries 'group' with context 'others'"),
        ({"backend": "auto"}, "backend 'auto' is unknown to context_attention"),
        ({"query": torch.ones(3, 4, 1, 16)}, r"query has shape \(3, 4, 1, 16\), expected \(3, 4, 2, 16\)"),
        ({"key_bias": torch.ones(3, 2, 8)}, "key_bias has shape"),
        ({"value": torch.ones(3, 5, 2, 16, dtype=torch.float16)}, "value is torch.float16 but the keys are"),
        ({"weights": torch.ones(3, 3, 5, dtype=torch.float16)}, "weights are torch.float16"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    groups: Any = ImageGroups.from_counts([3])
    arguments: dict[str, Any] = {
        "query": torch.ones(3, 4, 2, 16), "key": torch.ones(3, 5, 2, 16), "value": torch.ones(3, 5, 2, 16),
        "weights": torch.ones(3, 3, 5), "context": "others", "backend": "triton",
    } | changes  # fmt: skip
    with pytest.raises(ValueError, match=message):
        context_attention(groups=groups, **arguments)


def test_a_head_width_that_is_no_power_of_two_is_refused_by_triton_alone() -> None:
    inputs = drawn([2], 5, width=24)
    assert attend([2], "others", "image", "reference", **inputs).shape == inputs["query"].shape
    with pytest.raises(ValueError, match="heads are 24 wide"):
        attend([2], "others", "image", "triton", **inputs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, F16, F32])
@pytest.mark.parametrize("setting", SEARCH_SPACE["context_forward"] + SEARCH_SPACE["context_backward"])
@pytest.mark.parametrize("context,queries", [("others", "image"), ("all", "image"), ("all", "group")])
def test_every_setting_at_the_real_shape(context: str, queries: str, setting: Any, dtype: torch.dtype) -> None:
    counts = [1, 2, 5, 0, 10]
    inputs = drawn(
        counts, 257, context=context, queries=queries, dtype=dtype, heads=12, num_queries=32, width=64, bias=True
    )
    for kv_setting in SEARCH_SPACE["context_kv_grad"]:
        assert isinstance(kv_setting, KernelSetting)
        run = partial(direct, kernels, inputs, counts, context, queries, setting, kv_setting)
        assert_kernels_accurate(inputs, counts, context, queries, run=run)
