"""A run: which tables, and how their rows are filled, with a GPU and without."""

import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks.kernels import counts, machine, measure
from benchmarks.kernels.cases import Case, Inputs, make_inputs
from benchmarks.kernels.floors import Rates
from benchmarks.kernels.gate import Gate
from benchmarks.kernels.registry import IMPLEMENTATIONS, Implementation, Structure, rows_of
from benchmarks.kernels.report import Table, new_table
from benchmarks.kernels.shapes import CONTEXTS, SHAPES, Context, Level, Shape, reduced, sweep

Say = Callable[[str], None]
DTYPE = torch.bfloat16
HARD_LOGITS = 5.0


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; empty means all."""

    shapes: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ()
    contexts: tuple[Context, ...] = ()
    modes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    quick: bool = False

    def takes(self, case: Case) -> bool:
        shape = "N" if case.shape.name.startswith("N") else case.shape.name
        mode = "trained" if case.trained else "frozen"
        return (
            (not self.shapes or shape in self.shapes)
            and (not self.levels or case.level in self.levels)
            and (not self.contexts or case.context in self.contexts)
            and (not self.modes or mode in self.modes)
        )


def gpu_cases(selection: Selection) -> list[Case]:
    """Every table of the protocol, headline first."""
    cases = [case for shape in SHAPES.values() for case in _of_shape(shape, ("op", "cross", "qformer", "mix"))]
    cases += [replace(case, logit_sd=HARD_LOGITS) for case in _of_shape(SHAPES["A"], ("op", "cross"))]
    cases += _sweep_cases(("cross", "qformer"))
    return [case for case in cases if selection.takes(case)]


def cpu_cases(selection: Selection) -> list[Case]:
    """What is counted without a GPU: everything of one layer, and the whole Q-Former on the headline shape."""
    cases = _of_shape(SHAPES["A"], ("op", "cross", "qformer", "mix"))
    if not selection.quick:
        others = [shape for shape in SHAPES.values() if shape.name != "A"]
        cases += [case for shape in others for case in _of_shape(shape, ("cross",))]
        cases += _sweep_cases(("qformer",))
    return [case for case in cases if selection.takes(case)]


def _of_shape(shape: Shape, levels: Sequence[Level]) -> list[Case]:
    cases = []
    for level in levels:
        for context in CONTEXTS:
            for trained in (False, True):
                if level == "mix" and trained:
                    continue  # nothing of it depends on what else trains
                structures: tuple[Structure, ...] = ("found", "shared") if level == "qformer" else ("found",)
                cases += [Case(level, shape, context, trained, structure) for structure in structures]
    return cases


def _sweep_cases(levels: Sequence[Level]) -> list[Case]:
    """Against the number of images: libraries with our structure, so that the kernels alone differ."""
    return [
        Case(level, shape, "others", False, "shared" if level == "qformer" else "found")
        for level in levels
        for shape in sweep()
    ]


# --- without a GPU ---------------------------------------------------------------------------------------------------


def run_on_cpu(selection: Selection, say: Say) -> list[Table]:
    """Counts of full shapes, and correctness on reduced ones. No times."""
    cases = cpu_cases(selection)
    verdicts = check_on_cpu({(c.level, c.context, c.trained, c.structure) for c in cases}, selection, say)
    jobs = [(i, name) for i, case in enumerate(cases) for name in _countable(case, selection)]
    say(f"counting {len(jobs)} rows of {len(cases)} tables")
    counted = dict(zip(jobs, _in_processes(count_row, [(cases[i], name) for i, name in jobs])))
    tables = []
    for i, case in enumerate(cases):
        table = new_table(case, rates=None)
        rows = rows_of(case.level, case.structure, context=case.context, only=selection.only)
        for name, implementation in rows.items():
            key = (case.level, case.context, case.trained, case.structure, name)
            row = {"name": name, "label": implementation.label, "family": implementation.family}
            row |= verdicts.get(key, {"match": "-", "why": ""})
            row |= counted.get((i, name), {})
            if (i, name) in counted or case.shape.name == "A":
                table["rows"].append(row)
        tables.append(table)
    return tables


def check_on_cpu(
    keys: Iterable[tuple[Level, Context, bool, Structure]], selection: Selection, say: Say
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """match and why of every implementation, in float32 on a ragged batch of toy widths, against float64."""
    verdicts: dict[tuple[Any, ...], dict[str, Any]] = {}
    device = torch.device("cpu")
    for level, context, trained, structure in sorted(keys):
        case = Case(level, reduced(SHAPES["E"]), context, trained, structure)
        gate = Gate(case, device=device, dtype=torch.float32, backend="reference")
        for name, implementation in rows_of(level, structure, context=context, only=selection.only).items():
            key = (level, context, trained, structure, name)
            if implementation.forward_only:
                verdicts[key] = {"match": "-", "why": "forward alone: needs a GPU"}
                continue
            if implementation.is_absent:
                verdicts[key] = {"match": "absent", "why": f"{implementation.requires} is not installed"}
                continue
            if implementation.compiled and not implementation.without_backward_on_cpu:
                verdicts[key] = {"match": "-", "why": f"{implementation.same_as} under torch.compile: needs a GPU"}
                continue
            run = replace(implementation, compiled=False).build(level)
            backward = not implementation.without_backward_on_cpu
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
                verdict = gate.judge(implementation, run, full=True, backward=backward)
            why = verdict.why if backward else "output alone: no backward pass on a CPU"
            verdicts[key] = {"match": verdict.match, "why": why, "errors": dict(verdict.errors)}
    say(f"correctness in float32 on toy widths: {sum(v['match'] == 'ok' for v in verdicts.values())} rows ok")
    return verdicts


def _countable(case: Case, selection: Selection) -> list[str]:
    """Rows that are counted here; of a loop, which takes long, the headline shape alone."""
    return [
        name
        for name, implementation in rows_of(
            case.level, case.structure, context=case.context, only=selection.only
        ).items()
        if not implementation.compiled
        and not implementation.forward_only
        and not implementation.is_absent
        and (implementation.family != "loop" or case.shape.name == "A")
    ]


def count_row(case: Case, name: str) -> dict[str, Any]:
    """Counts of one row. A loop over images grows by the same amount with every image beyond the second: two small
    counts give a large one exactly (a test says so)."""
    implementation = IMPLEMENTATIONS[name]
    n = case.shape.most_images
    if implementation.family != "loop" or case.level != "qformer" or n < 4 or len(set(case.shape.counts)) > 1:
        return counts.count(case, implementation).to_dict()
    two, three = (
        counts.count(
            replace(case, shape=replace(case.shape, counts=(m,) * case.shape.groups)), implementation
        ).to_dict()
        for m in (2, 3)
    )
    return {
        key: value + (n - 2) * (three[key] - value) if isinstance(value, (int, float)) else value
        for key, value in two.items()
    }


def _in_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """One process per core, since fake tensors are slow Python; none for a few rows, which would start slower."""
    workers = min(os.cpu_count() or 1, 8)
    if workers < 2 or len(arguments) < 10:
        return [function(*a) for a in arguments]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *zip(*arguments)))


# --- on a GPU --------------------------------------------------------------------------------------------------------


def run_on_gpu(selection: Selection, rates: Rates, say: Say) -> list[Table]:
    """Times of every table; a row is timed only after the gate."""
    device = torch.device("cuda")
    tables = []
    for case in gpu_cases(selection):
        say(f"{case.level} {case.shape.name} {case.context} {'trained' if case.trained else 'frozen'} {case.structure}")
        tables.append(gpu_table(case, selection, rates=rates, device=device))
        measure.release()
    return tables


def gpu_table(case: Case, selection: Selection, *, rates: Rates, device: torch.device) -> Table:
    """One table: gate, warm-up, then all rows in turn."""
    table = new_table(case, rates=rates)
    implementations = rows_of(case.level, case.structure, context=case.context, only=selection.only)
    rows: dict[str, dict[str, Any]] = {}
    runs = {}
    gate = Gate(case, device=device, dtype=DTYPE, backend="triton")
    for name, implementation in implementations.items():
        rows[name] = {"name": name, "label": implementation.label, "family": implementation.family, "why": ""}
        if implementation.is_absent:
            rows[name] |= {"match": "absent", "why": f"{implementation.requires} is not installed"}
            continue
        try:
            runs[name] = implementation.build(case.level)
            verdict = gate.judge(implementation, runs[name], full=True, backward=not implementation.forward_only)
        except Exception as error:  # out of memory, unsupported shape: the row says so, the table goes on
            rows[name] |= {"match": "error", "why": _first_line(error)}
            continue
        rows[name] |= {"match": verdict.match, "why": verdict.why, "errors": dict(verdict.errors)}
        if implementation.family == "ours" and case.level != "mix" and not implementation.forward_only:
            rows[name]["config"] = machine.setting_text(case.shape, device, DTYPE, trained=case.trained)
    del gate
    _measure(case, implementations, rows, runs, selection, device)
    table["rows"] = list(rows.values())
    return table


def _measure(
    case: Case,
    implementations: dict[str, Implementation],
    rows: dict[str, dict[str, Any]],
    runs: dict[str, Any],
    selection: Selection,
    device: torch.device,
) -> None:
    """Fill in what a GPU can tell of the rows that passed."""
    sets: dict[tuple[Any, ...], list[Inputs]] = {}
    measured: dict[str, measure.Row] = {}
    for name in [name for name, row in rows.items() if row["match"] == "ok"]:
        implementation = implementations[name]
        key = (implementation.weights_float32, implementation.attention if case.level == "qformer" else "")
        try:
            if key not in sets:
                sets[key] = _input_sets(case, implementation, device)
            row = measure.Row(runs[name], sets[key])
            rows[name]["compile_seconds"] = measure.warm_up(row)
            if row.has_backward:  # the peak of a pass that keeps nothing is not beside theirs
                rows[name]["peak_bytes"] = measure.peak_bytes(row)
            rows[name]["kernels_forward"], rows[name]["kernels_backward"] = measure.kernels_launched(row)
            if not implementation.compiled:
                rows[name]["attention"] = ", ".join(_attention_taken(row))
        except Exception as error:
            rows[name] |= {"match": "error", "why": _first_line(error)}
            continue
        measured[name] = row
    samples, reps = (5, 5) if selection.quick else (measure.SAMPLES, measure.REPS)
    for name, timings in measure.measure_rows(measured, samples=samples, reps=reps).items():
        rows[name] |= {which: timing.to_dict() for which, timing in timings.items()}
    if selection.quick:
        return
    _measure_variants(case, implementations, rows, runs, measured, device)


def _measure_variants(
    case: Case,
    implementations: dict[str, Implementation],
    rows: dict[str, dict[str, Any]],
    runs: dict[str, Any],
    measured: dict[str, measure.Row],
    device: torch.device,
) -> None:
    """Without the host (CUDA graph), with it (wall time of loops), flushed L2, strided gradients of the output."""
    for name, row in measured.items():
        if implementations[name].family == "loop":
            rows[name]["wall_both"] = measure.wall_milliseconds(row)
            continue
        passes: tuple[Literal["forward", "both"], ...] = ("forward", "both") if row.has_backward else ("forward",)
        for which in passes:
            try:
                rows[name][f"graph_{which}"] = measure.graph_milliseconds(row, which)
            except Exception as error:
                rows[name]["graph_why"] = _first_line(error)
                with contextlib.suppress(RuntimeError):
                    torch.cuda.synchronize()
    if case.level == "qformer":  # its weights alone are larger than the L2 cache
        return
    flushed = measure.measure_rows(
        measured, passes=("forward", "backward"), samples=10, reps=5, before=measure.flush(device)
    )
    for name, timings in flushed.items():
        rows[name]["flushed"] = {which: timing.to_dict() for which, timing in timings.items()}
    if case.level == "op":
        sliced = {name: measure.Row(runs[name], row.sets, sliced=True) for name, row in measured.items()}
        for name, timings in measure.measure_rows(sliced, passes=("backward",), samples=10).items():
            rows[name]["backward_sliced"] = timings["backward"].to_dict()


def _input_sets(case: Case, implementation: Implementation, device: torch.device) -> list[Inputs]:
    """Different values of one shape; one model for all of them."""
    first = make_inputs(case, implementation, device=device, dtype=DTYPE, backend="triton", seed=1)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    number = 4 if case.level == "qformer" else measure.number_of_sets(first.num_bytes(), l2)
    more = (
        make_inputs(case, implementation, device=device, dtype=DTYPE, backend="triton", seed=2 + i, like=first)
        for i in range(number - 1)
    )
    return [first, *more]


def _attention_taken(row: measure.Row) -> tuple[str, ...]:
    """The attention operations that one forward pass dispatched: what SDPA chose."""
    with counts.Watch() as seen:
        row.forward(0)
    return counts.attention_of(seen.names)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
