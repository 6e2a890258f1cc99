"""A run: one table of rows, filled with times on a GPU and with counts elsewhere."""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.train import measure
from benchmarks.train.gate import Outcome, Verdict, judge, outcome_of
from benchmarks.train.lengths import Text
from benchmarks.train.loops import ROWS, Loop, OurLoop, Row, Setting
from benchmarks.train.models import construct_ours
from benchmarks.train.samples import StepData, draw_step
from benchmarks.train.shapes import SHAPES, ModelShape, Train, trains
from benchmarks.train.work import OPTIMIZER_BYTES, Work

Say = Callable[[str], None]
Table = dict[str, Any]
DEFAULT_PEERS = ("ours_unguided", "ours_zero", "instructblip", "reference", "reference_sdpa")
EXTRAS = ("data", "checkpoint", "first_step")


@dataclass(frozen=True)
class Selection:
    """What the command line asks for. shape: with its budgets, l, k and context as they are to be run."""

    shape: ModelShape
    train: Train
    text: Text = "mini"
    peers: tuple[str, ...] = DEFAULT_PEERS
    checkpointing: bool = False
    rounds: int = measure.ROUNDS
    steps: int = measure.STEPS
    seconds: float | None = None  # for all rounds; None: as long as they take
    extras: tuple[str, ...] = ()
    num_workers: int = 8
    trace: Path | None = None
    seed: int = 0

    @property
    def rows(self) -> list[Row]:
        return [ROWS[name] for name in ("ours", *(p for p in self.peers if p != "ours"))]

    def data(self, shape: ModelShape | None = None) -> StepData:
        shape = shape or self.shape
        return draw_step(shape, text=self.text, samples=shape.samples, max_images=shape.max_images, seed=self.seed)

    def setting(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Setting:
        return Setting(self.shape, self.train, dtype, device, self.checkpointing)


def is_guided(name: str) -> bool:
    return name not in ("ours_unguided", "instructblip")


def new_table(selection: Selection, setting: Setting, data: StepData) -> Table:
    """Shape, samples and real work; rows without figures."""
    works = {guided: Work(setting, data, guided=guided) for guided in (True, False)}
    rows = []
    for row in selection.rows:
        work = works[is_guided(row.name)]
        family = "ours" if row.name.startswith("ours") else "loop" if row.name.startswith("reference") else "library"
        rows.append(
            {"name": row.name, "label": row.label, "family": family, "match": "-", "why": "", "work": work.parts}
        )
    return {
        "shape": selection.shape.name,
        "note": selection.shape.note,
        "train": selection.train,
        "text": selection.text,
        "context": selection.shape.context,
        "layers": [selection.shape.initial_layer, selection.shape.contextual_layer],
        "checkpointing": selection.checkpointing,
        "compared": "peers" if any(row["family"] != "ours" for row in rows) else "parts of ours",
        "data": {
            "description": data.describe(),
            "samples": len(data.samples),
            "images": data.num_images,
            "tokens": data.num_tokens,
            "labels": data.num_labels,
            "packs": [len(chosen) for chosen in data.packs],
        },
        "parameters": dict(zip(("all", "trainable"), parameters(setting))),
        "rows": rows,
    }


def parameters(setting: Setting, *, guided: bool = True) -> tuple[int, int]:
    """All, and trainable ones: from shapes alone."""
    from samtrain.model.freezing import apply_freezing
    from samtrain.model.lora import attach_lora

    options = trains(setting.train, guided=guided)
    meta = torch.device("meta")
    model = construct_ours(setting.shape, guided=guided, dtype=setting.dtype, device=meta)
    if options.language_model == "lora":
        with meta:
            attach_lora(model, options.lora)
    apply_freezing(model, options)
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for _, n in counts)


def least_bytes(setting: Setting) -> int:
    """Weights, gradients in their precision, float32 master copies and moments: what a row needs before activations."""
    total, trainable = parameters(setting)
    width = torch.finfo(setting.dtype).bits // 8
    return width * (total + trainable) + 12 * trainable


# --- without a GPU ---------------------------------------------------------------------------------------------------


def run_on_cpu(selection: Selection, say: Say, *, counts: bool = True) -> Table:
    """Correctness on the toy shape, and counts of the real one. No times."""
    cpu = torch.device("cpu")
    setting, data = selection.setting(cpu), selection.data()
    table = new_table(selection, setting, data)
    say(f"{selection.shape.name} {selection.train}: {data.describe()}")
    verdicts = gate_on_toy(selection)
    say("gate on the toy shape: " + ", ".join(f"{name} {v.match}" for name, v in verdicts.items()))
    for row in table["rows"]:
        if ROWS[row["name"]].requires and not _is_installed(ROWS[row["name"]].requires):
            row |= {"match": "absent", "why": f"{ROWS[row['name']].requires} is not installed"}
            continue
        if row["name"] in verdicts:
            verdict = verdicts[row["name"]]
            row |= {"match": verdict.match, "why": verdict.why, "errors": verdict.errors}
        if ROWS[row["name"]].on_gpu_alone:
            row["why"] = ROWS[row["name"]].on_gpu_alone
        elif counts:
            from benchmarks.train.counts import count_step

            row["counts"] = count_step(ROWS[row["name"]], setting, data).to_dict()
            say(f"counted {row['label']}")
    return table


def gate_on_toy(selection: Selection) -> dict[str, Verdict]:
    """Every row that a CPU can run, in float32 at toy widths, with the table's context and what trains."""
    shape = replace(SHAPES["tiny"], context=selection.shape.context)
    setting = Setting(shape, selection.train, torch.float32, torch.device("cpu"), selection.checkpointing)
    rows = [row for row in selection.rows if not row.on_gpu_alone]
    loops = make_loops(rows, setting, selection.data(shape))
    return gate(loops, setting.dtype)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def run_on_gpu(selection: Selection, say: Say, *, memory_bytes: int, device: torch.device) -> Table:
    """Gate, times of all rows in turn, then what is looked at in ours alone. (On a CPU a test rehearses it.)"""
    setting, data = selection.setting(device), selection.data()
    table = new_table(selection, setting, data)
    rows = {row["name"]: row for row in table["rows"]}
    say(f"{selection.shape.name} {selection.train}: {data.describe()}")
    least = least_bytes(setting)
    table["least_bytes"] = least
    say(f"weights, gradients and optimizer: {least / measure.GIB:.1f} of {memory_bytes / measure.GIB:.1f} GiB")
    if least > memory_bytes:
        for row in rows.values():
            why = f"needs {least / measure.GIB:.1f} GiB before activations"
            row |= {"match": "-", "status": "does not fit", "why": why}
        return table
    ours = _measure(selection, setting, data, rows)  # the other loops are gone: the extras want the whole device
    measure.free()
    table["extras"] = _extras(selection, ours, say) if _is_sound(rows["ours"]) else {}
    return table


def _measure(selection: Selection, setting: Setting, data: StepData, rows: dict[str, dict[str, Any]]) -> Loop:
    """Fill in the rows; returns the loop of ours."""
    loops = _loops_that_fit(selection, setting, data, rows)
    verdicts = gate(loops, setting.dtype)
    for name, verdict in verdicts.items():
        if name in rows:
            rows[name] |= {"match": verdict.match, "why": verdict.why, "errors": verdict.errors}
    timed = {name: loop for name, loop in loops.items() if name in rows and rows[name]["match"] in ("ok", "-")}
    measure.free()
    found_rows = measure.measure_rows(timed, rounds=selection.rounds, steps=selection.steps, seconds=selection.seconds)
    for name, found in found_rows.items():
        rows[name] |= found
        rows[name]["num_padded_tokens"] = loops[name].num_padded_tokens
    for name in timed:
        if "status" not in rows[name]:
            with measure.active(loops[name]) as loop:
                loop.step()
                rows[name]["breakdown"] = measure.breakdown(loop)
        measure.free()
    return loops["ours"]


def _is_sound(row: dict[str, Any]) -> bool:
    return row["match"] == "ok" and "status" not in row


def _loops_that_fit(
    selection: Selection, setting: Setting, data: StepData, rows: dict[str, dict[str, Any]]
) -> dict[str, Loop]:
    wanted = [row for row in selection.rows if not row.requires or _is_installed(row.requires)]
    for row in selection.rows:
        if row not in wanted:
            rows[row.name] |= {"match": "absent", "why": f"{row.requires} is not installed"}
    return make_loops(wanted, setting, data, found=rows)


def _extras(selection: Selection, loop: Loop, say: Say) -> dict[str, Any]:
    """Of ours: trace, data wait, checkpoint stall, time to the first step."""
    assert isinstance(loop, OurLoop)
    found: dict[str, Any] = {}

    def attempt(name: str, work: Callable[[], dict[str, Any]]) -> None:
        say(f"extra: {name}")
        try:
            found[name] = work()
        except (ImportError, OSError, torch.OutOfMemoryError) as error:  # a package, disk or memory that is not there
            found[name] = {"absent": f"{type(error).__name__}: {error}"}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}

    with tempfile.TemporaryDirectory() as folder, measure.active(loop):
        loop.step()
        if selection.trace is not None:
            measure.trace(loop, str(selection.trace))
        if "data" in selection.extras:
            attempt("data", lambda: _data_wait(selection, loop, Path(folder)))
        if "checkpoint" in selection.extras:
            attempt("checkpoint", lambda: _checkpoint(loop, Path(folder)))
    if "first_step" in selection.extras:
        with tempfile.TemporaryDirectory() as folder:
            attempt("first_step", lambda: _first_step(selection, loop, Path(folder)))
    return found


def _data_wait(selection: Selection, loop: OurLoop, folder: Path) -> dict[str, Any]:
    from benchmarks.train.data_wait import data_wait, write_set

    shape = selection.shape
    write_set(folder, text=selection.text, samples=4 * shape.samples)
    found = data_wait(
        loop, folder, samples=shape.samples, steps=20, num_workers=selection.num_workers, max_images=shape.max_images
    )
    return found | {"num_workers": selection.num_workers}


def _checkpoint(loop: OurLoop, folder: Path) -> dict[str, Any]:
    from benchmarks.train.checkpoint_stall import save_while_training

    measure.synchronize(loop)
    return save_while_training(loop, folder / "run")


def _first_step(selection: Selection, loop: Loop, folder: Path) -> dict[str, Any]:
    from benchmarks.train import first_step

    num_bytes = first_step.write_weights(loop.module, folder)
    loop.module.to("meta")  # the child wants the whole device
    measure.free()
    shape = selection.shape
    stages = first_step.in_a_process(
        {
            "shape": shape.name, "train": selection.train, "weights": str(folder), "text": selection.text,
            "samples": shape.samples, "max_images": shape.max_images, "checkpointing": selection.checkpointing,
            "device": loop.setting.device.type, "dtype": "bfloat16",
        }
    )  # fmt: skip
    return {"stages_seconds": stages, "weight_bytes": num_bytes}


# --- both ------------------------------------------------------------------------------------------------------------


def make_loops(
    rows: list[Row], setting: Setting, data: StepData, *, found: dict[str, dict[str, Any]] | None = None
) -> dict[str, Loop]:
    """Name -> loop, the gate's yardsticks among them. `found`, of rows, gets the reason where one cannot be built."""
    found = {} if found is None else found
    wanted = list(dict.fromkeys([*(row.name for row in rows), *(row.gate for row in rows if row.gate)]))
    loops: dict[str, Loop] = {"ours": ROWS["ours"].make(setting, data, None)}
    for name in wanted:
        if name == "ours":
            continue
        try:
            loops[name] = ROWS[name].make(setting, data, loops["ours"].module)
        except Exception as error:
            found.get(name, {}).update(measure.failure(error))
    return loops


def gate(loops: dict[str, Loop], dtype: torch.dtype) -> dict[str, Verdict]:
    """Row -> verdict. Yardsticks come first and keep their gradients until their rows were judged.

    A row that raises is an error of its own; one whose yardstick raised cannot be told right from wrong.
    """
    verdicts: dict[str, Verdict] = {}
    yardsticks: dict[str, list[str]] = {}
    for name in loops:
        yardstick = ROWS[name].gate
        if yardstick in loops:
            yardsticks.setdefault(str(yardstick), []).append(name)
    for yardstick, names in yardsticks.items():
        expected = _outcome_or_error(loops[yardstick])
        for name in names:
            found = _outcome_or_error(loops[name])
            if isinstance(found, Verdict):
                verdicts[name] = found
            elif isinstance(expected, Verdict):
                verdicts.setdefault(name, Verdict("-", f"not compared: its yardstick, {yardstick}, failed in the gate"))
            else:
                verdicts[name] = judge(found, expected, dtype)
            del found
            measure.free()
        verdicts.setdefault(yardstick, expected if isinstance(expected, Verdict) else Verdict("ok", "yardstick"))
    return verdicts


def _outcome_or_error(loop: Loop) -> Outcome | Verdict:
    try:
        return outcome_of(loop)
    except torch.OutOfMemoryError:  # its step alone may fit: here the yardstick's gradients are kept beside
        return Verdict("-", "the gate ran out of memory: not compared")
    except Exception as error:
        return Verdict("error", measure.failure(error)["why"])


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # imports of it are blocked
        return False


def optimizer_bytes(table: Table) -> float:
    """Least traffic of the update."""
    return float(OPTIMIZER_BYTES) * table["parameters"]["trainable"]
