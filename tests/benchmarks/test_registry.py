"""Every implementation computes the same function: float64 against float32, outputs and gradients, toy widths."""

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.kernels import implementations, streams
from benchmarks.kernels.cases import Case, Inputs, make_inputs, needing_gradients, output_gradients
from benchmarks.kernels.gate import Gate
from benchmarks.kernels.inputs import CrossInputs
from benchmarks.kernels.registry import IMPLEMENTATIONS, Implementation, reference_of, rows_of
from benchmarks.kernels.shapes import CONTEXTS, LEVELS, SHAPES, Context, Level, reduced

CPU = torch.device("cpu")
RAGGED = replace(reduced(SHAPES["E"]), counts=(2, 1, 3))


def inputs_of(case: Case, implementation: Implementation, **options: Any) -> Inputs:
    defaults: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "backend": "reference"}
    return make_inputs(case, implementation, **(defaults | options))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_implementation_agrees_with_float64(level: Level, context: Context) -> None:
    """Compiled rows as their uncompiled function; a ragged batch with a sample of one image."""
    for structure in ("found", "shared") if level == "qformer" else ("found",):
        shape = RAGGED if context == "all" else replace(RAGGED, counts=(2, 4, 3))  # see the next test
        case = Case(level, shape, context, True, structure)  # type: ignore[arg-type]
        gate = Gate(case, device=CPU, dtype=torch.float32, backend="reference")
        for name, implementation in rows_of(level, structure).items():  # type: ignore[arg-type]
            if implementation.is_absent or implementation.forward_only:  # test_dual.py
                continue
            run = replace(implementation, compiled=False).build(level)
            backward = not implementation.without_backward_on_cpu
            verdict = gate.judge(implementation, run, full=True, backward=backward)
            assert verdict.is_ok, f"{name}: {verdict.why}"


def test_a_uniform_batch_takes_the_paths_without_index_tables() -> None:
    case = Case("cross", reduced(SHAPES["A"]), "others", True)
    gate = Gate(case, device=CPU, dtype=torch.float32, backend="reference")
    for name in ("loop", "mixed_compiled", "ours"):
        implementation = replace(IMPLEMENTATIONS[name], compiled=False)
        assert gate.judge(implementation, implementation.build("cross"), full=True).is_ok, name


def test_an_empty_context_is_zero_in_ours_and_in_the_mixed_rows() -> None:
    """A sample of one image with `others`. (Materialised rows read the key's and value's bias there, which the model
    ignores: guidance is off for such an image.)"""
    case = Case("op", replace(RAGGED, counts=(1, 2)), "others", False)
    for name in ("ours", "mixed", "mixed_compiled"):
        implementation = replace(IMPLEMENTATIONS[name], compiled=False)
        (output,) = implementation.build("op")(inputs_of(case, implementation))
        assert not output[0].any() and output[1:].abs().min() > 0, name


def test_our_triton_row_agrees_in_the_interpreter() -> None:
    case = Case("op", replace(RAGGED, counts=(2, 1)), "all", True)
    gate = Gate(case, device=CPU, dtype=torch.float32, backend="triton")
    ours = IMPLEMENTATIONS["ours"]
    verdict = gate.judge(ours, ours.build("op"), full=False)
    assert verdict.is_ok, verdict.why


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_our_structure_for_libraries_is_the_models(context: Context, trained: bool) -> None:
    """`streams.shared` repeats the loop of samtrain/model/guidance.py; the two must not drift apart."""
    case = Case("qformer", replace(RAGGED, counts=(2, 3), initial_layer=3), context, trained, "shared")
    given = inputs_of(case, IMPLEMENTATIONS["sdpa_shared"])
    assert isinstance(given, streams.QformerInputs)
    results = []
    for run in (lambda x: streams.shared(x, streams.materialised_reader), streams.ours_materialised):
        (output,) = run(given)
        output.sum().backward()
        results.append([output.detach(), *(leaf.grad.clone() for leaf in given.leaves() if leaf.grad is not None)])
        for leaf in given.leaves():
            leaf.grad = None
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_compiled_rows_compile_once_for_all_input_sets() -> None:
    """Inductor is left to the GPU; Dynamo sees the same graph here, without a break."""
    from torch._dynamo.testing import CompileCounter

    for level, name in (("op", "sdpa_compiled"), ("cross", "mixed_compiled"), ("cross", "ours_compiled")):
        torch.compiler.reset()
        implementation, counter = IMPLEMENTATIONS[name], CompileCounter()
        run = implementation.build(level, compile_backend=counter)  # type: ignore[arg-type]
        case = Case(level, RAGGED, "all", True)  # type: ignore[arg-type]
        for seed in (1, 2, 3):
            run(inputs_of(case, implementation, seed=seed))
        assert counter.frame_count == 1, name


def test_flash_attn_is_called_with_lengths_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package needs a GPU; its function by a stand-in that takes the lengths seriously."""

    def varlen(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        parts = []
        for r in range(len(cu_q) - 1):
            rows, columns = slice(cu_q[r], cu_q[r + 1]), slice(cu_k[r], cu_k[r + 1])
            assert cu_q[r + 1] - cu_q[r] <= max_q and cu_k[r + 1] - cu_k[r] <= max_k
            parts.append(implementations.eager_attention(q[rows][None], k[columns][None], v[columns][None])[0])
        return torch.cat(parts)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    case = Case("cross", RAGGED, "all", True)
    gate = Gate(case, device=CPU, dtype=torch.float32, backend="reference")
    flash = IMPLEMENTATIONS["flash"]
    verdict = gate.judge(flash, flash.build("cross"), full=False)
    assert verdict.is_ok, verdict.why


@pytest.mark.parametrize("level", ["op", "cross"])
def test_the_gate_fails_a_row_that_is_a_little_wrong(level: Level) -> None:
    case = Case(level, RAGGED, "all", True)
    gate = Gate(case, device=CPU, dtype=torch.float32, backend="reference")
    right = IMPLEMENTATIONS["sdpa"]
    run = right.build(level)

    def wrong_output(inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x * 1.0001 for x in run(inputs))

    def wrong_gradient(inputs: CrossInputs) -> tuple[torch.Tensor, ...]:
        query = inputs.context_query
        return run(replace(inputs, context_query=query.detach() + (query - query.detach()) * 1.001))

    def nan(inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x / (x != x[0, 0, 0, 0]) for x in run(inputs))

    assert gate.judge(right, run, full=True).is_ok
    for planted, named in ((wrong_output, "output"), (wrong_gradient, "context_query"), (nan, "NaN")):
        verdict = gate.judge(right, planted, full=True)
        assert verdict.match == "FAIL" and named in verdict.why


def test_the_gate_sees_a_fault_that_only_the_full_shape_has() -> None:
    case = Case("op", reduced(SHAPES["A"]), "others", False)
    gate = Gate(case, device=CPU, dtype=torch.float32, backend="reference")
    right = IMPLEMENTATIONS["sdpa"]
    run = right.build("op")

    def last_sample_is_wrong(inputs: CrossInputs) -> tuple[torch.Tensor, ...]:
        (x,) = run(inputs)
        return (torch.cat([x[:10], x[10:] * 1.01]),)

    verdict = gate.judge(right, last_sample_is_wrong, full=True)
    assert verdict.match == "FAIL" and "full shape" in verdict.why


def test_ours_is_held_to_twice_eagers_error_and_libraries_to_the_ceiling() -> None:
    """The rule for ours is relative as well: bfloat16 noise that a library may have fails it."""
    case = Case("mix", RAGGED, "all", False)
    gate = Gate(case, device=CPU, dtype=torch.bfloat16, backend="reference")
    coarse = IMPLEMENTATIONS["mix_linear"]
    run = coarse.build("mix")
    assert gate.judge(coarse, run, full=True).is_ok
    assert "x eager's" in gate.judge(replace(coarse, family="ours"), run, full=True).why


def test_gradients_handed_to_a_row_are_random_and_may_be_strided() -> None:
    outputs = (torch.zeros(2, 3, 4, 5, requires_grad=True), torch.zeros(2, 3, 4, 5))
    assert len(needing_gradients(outputs)) == 1
    dense, sliced = output_gradients(outputs), output_gradients(outputs, sliced=True)
    assert all(torch.equal(a, b) for a, b in zip(dense, sliced))
    assert dense[0].is_contiguous() and not sliced[0].is_contiguous() and dense[0].std() > 0.5


def test_a_row_that_does_not_exist_is_refused_with_the_names_that_do() -> None:
    with pytest.raises(ValueError, match=r"no implementation our; choose from .*ours"):
        rows_of("op", only=("our",))


def test_every_compiled_row_names_the_row_it_is_compiled_from() -> None:
    for name, implementation in IMPLEMENTATIONS.items():
        assert implementation.same_as in ({*IMPLEMENTATIONS} if implementation.compiled else {None}), name
    assert all(not reference_of(level).compiled and level in reference_of(level).levels for level in LEVELS)
