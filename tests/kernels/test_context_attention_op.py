"""What PyTorch has to know of the operation `samtrain_kernels::context_attention`.

Most of it in float64, which runs by the reference formulas: registration is the same, and the interpreter is slow.
"""

from functools import partial
from typing import Any

import pytest
import torch
from samtrain_kernels import context_attention
from samtrain_kernels.testing import evaluate
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from samtrain.core.batch import ImageGroups

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value", "weights", "key_bias", "value_bias")
CASES = [("others", "image"), ("all", "image"), ("all", "group")]


def drawn(
    counts: list[int], patches: int, context: str, queries: str, dtype: torch.dtype, *, width: int = 16
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, groups, heads = sum(counts), len(counts), 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    key, value = normal(images, patches, 2, heads, width).to(DEVICE, dtype).unbind(2)
    contexts = images if context == "others" else groups
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "query": normal(images if queries == "image" else groups, 8, heads, width).to(DEVICE, dtype),
        "key": key,
        "value": value,
        "weights": normal(contexts, max(counts), patches).softmax(1).to(DEVICE, wide),
        "key_bias": normal(images, heads, width).to(DEVICE, dtype),
        "value_bias": normal(images, heads, width).to(DEVICE, dtype),
    }


def attend(counts: list[int], context: Any, queries: Any, backend: Any = "triton", **inputs: Tensor) -> Tensor:
    groups: Any = ImageGroups.from_counts(counts).to(DEVICE)
    query, key, value, weights = (inputs.pop(name) for name in NAMES[:4])
    return context_attention(
        query, key, value, weights, groups, context=context, queries=queries, backend=backend, **inputs
    )


def tables(counts: list[int]) -> tuple[Tensor, ...]:
    groups = ImageGroups.from_counts(counts).to(DEVICE)
    return groups.group_of_image, groups.slot_of_image, groups.images_of_group, groups.valid, groups.cu_images


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("context,queries", CASES)
def test_operations_pass_opcheck_forward_and_backward(context: str, queries: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and queries == "group":
        pytest.skip("the interpreter is slow; the other two take the same launches")
    forward = torch.ops.samtrain_kernels.context_attention.default
    backward = torch.ops.samtrain_kernels.context_attention_backward.default
    counts = [2, 1]
    inputs = drawn(counts, 3, context, queries, dtype)
    others = (*tables(counts), context, queries, 0.25)
    # A strided query and output gradient: results must not take their strides.
    query = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors = [query, *list(inputs.values())[1:]]
    options: dict[str, Any] = {}
    if dtype == torch.float16 or context == "all":  # tracing takes seconds, so once
        options = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    torch.library.opcheck(forward, (*(x.detach().requires_grad_() for x in tensors), *others), **options)
    torch.library.opcheck(forward, (*tensors[:4], None, None, *others), **options)
    output, lse = forward(*tensors, *others)
    gradient = torch.randn_like(query)
    frozen = [True, False, False, True, False, False]
    for biases, needs in ((tensors[4:], [True] * 6), ([None, None], frozen)):
        arguments = (gradient, output, lse, *tensors[:4], *biases, *others, needs)
        torch.library.opcheck(backward, arguments, **options)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("context,queries", CASES)
def test_gradcheck(context: str, queries: str, backend: str) -> None:
    counts = [3, 0, 1, 2]
    inputs = drawn(counts, 2, context, queries, torch.float64)
    tensors = [x.detach().requires_grad_() for x in inputs.values()]

    def function(*values: Tensor) -> Tensor:
        return attend(counts, context, queries, backend, **dict(zip(NAMES, values, strict=True)))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    "dynamic,backend,compiler",
    # The reference has more code of its own to compile than a test may wait for.
    [(False, "triton", "inductor"), (True, "triton", "inductor"), (True, "reference", "aot_eager")],
)
def test_compiles_whole(dynamic: bool, backend: str, compiler: str) -> None:
    """With `dynamic` one graph serves batches of any size."""

    def function(groups: Any, **inputs: Tensor) -> Tensor:
        query, key, value, weights = (inputs[name] for name in NAMES[:4])
        biases: Any = {"key_bias": inputs["key_bias"], "value_bias": inputs["value_bias"]}
        output = context_attention(
            query * 2,
            key,
            value,
            weights,
            groups,
            context="others",
            backend=backend,
            **biases,  # type: ignore[arg-type]
        )
        return output + 1  # something for the compiler on both sides of the operation

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    # No two axes of the first batch are equally long: PyTorch would take them for one.
    batches: list[tuple[list[int], int]] = [([4, 2, 5], 6), ([2, 1, 3, 7], 9)]
    for number, (counts, patches) in enumerate(batches[: 2 if dynamic else 1]):
        groups = ImageGroups.from_counts(counts).to(DEVICE)
        inputs = drawn(counts, patches, "others", "image", torch.float64)
        gradient = torch.randn_like(inputs["query"])
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            got = evaluate(partial(compiled, groups), inputs, gradient, wrt=NAMES)
        expected = evaluate(partial(function, groups), inputs, gradient, wrt=NAMES)
        for name in expected:
            assert torch.allclose(got[name], expected[name], rtol=1e-10, atol=1e-12), name


def test_checkpointing_recomputes_to_the_same_bits_and_a_policy_can_keep_the_output() -> None:
    counts = [3, 2]
    inputs = drawn(counts, 7, "others", "image", torch.float64)
    gradient = torch.randn_like(inputs["query"])
    plain = partial(attend, counts, "others", "image")
    expected = evaluate(plain, inputs, gradient, wrt=NAMES)
    seen = []

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_ours = operation == torch.ops.samtrain_kernels.context_attention.default
        seen.append((is_ours, context.is_recompute))
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    selective = partial(create_selective_checkpoint_contexts, policy)
    for options in ({}, {"context_fn": selective}):

        def recomputed(options: Any = options, **values: Tensor) -> Tensor:
            return checkpoint(
                lambda *tensors: plain(**dict(zip(NAMES, tensors))), *values.values(), use_reentrant=False, **options
            )

        got = evaluate(recomputed, inputs, gradient, wrt=NAMES)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (True, False) in seen


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_takes_the_activations_and_leaves_the_weights(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference formulas: the interpreter cannot multiply bfloat16."""
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
    counts = [3, 2]
    inputs = drawn(counts, 7, "others", "image", torch.float32)
    gradient = torch.randn_like(inputs["query"])

    def under_autocast(**values: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return attend(counts, "others", "image", backend, **values)

    got = evaluate(under_autocast, inputs, gradient, wrt=NAMES)
    rounded = {name: x if name == "weights" else x.to(torch.bfloat16) for name, x in inputs.items()}
    expected = evaluate(partial(attend, counts, "others", "image", backend), rounded, gradient, wrt=NAMES)
    assert got["output"].dtype == torch.bfloat16 and got["weights"].dtype == torch.float32
    for name in expected:
        assert torch.equal(got[name], expected[name].to(got[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_triton_the_operation_runs_the_reference_formulas(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward alike to the last bit; backward derived by hand against autograd's."""
    if DEVICE == "cuda":
        pytest.skip("CUDA tensors always run the kernels")
    monkeypatch.delenv("TRITON_INTERPRET")
    counts = [3, 1, 2]
    for context, queries in CASES:
        inputs = drawn(counts, 9, context, queries, dtype)
        gradient = torch.randn_like(inputs["query"])
        got, expected = (
            evaluate(partial(attend, counts, context, queries, backend), inputs, gradient, wrt=NAMES)
            for backend in ("triton", "reference")
        )
        assert torch.equal(got["output"], expected["output"])
        slack = 1e-5 if dtype == torch.float32 else 2e-2
        for name in NAMES:
            assert (got[name] - expected[name]).abs().max() <= slack * expected[name].abs().max(), name
