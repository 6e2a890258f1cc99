"""Tables: JSON that holds everything, and text for people.

A table is {"level", "shape", "context", "trained", "structure", "logit_sd", "images", "floor", "rows"}; a row has its
name, label, family, "match", and what was measured. Times exist in runs on a GPU alone: `table_text` refuses a table
that holds one under a header without a GPU.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.grid import grid
from benchmarks.kernels.cases import Case
from benchmarks.kernels.floors import Rates, floor
from benchmarks.kernels.machine import headline
from benchmarks.kernels.shapes import LEVELS, SHAPES

Table = dict[str, Any]
TIME_KEYS = ("forward", "backward", "both", "graph_forward", "graph_both", "wall_both", "compile_seconds")
KEY = ("level", "shape", "context", "trained", "structure", "logit_sd")


class TimesWithoutGpuError(ValueError):
    """A table holds times although its header names no GPU."""


def new_table(case: Case, *, rates: Rates | None) -> Table:
    """A table without rows; floors in seconds where the device's rates are known."""
    floors = {}
    for direction in ("forward", "backward"):
        work = floor(case.level, case.shape, case.context, trained=case.trained, direction=direction)
        floors[direction] = {"flops": work.flops, "bytes": work.bytes}
        if rates is not None:
            floors[direction]["milliseconds"] = work.seconds(rates) * 1e3
    return {
        "level": case.level,
        "shape": case.shape.name,
        "description": case.shape.describe(),
        "images": case.shape.most_images,
        "context": case.context,
        "trained": case.trained,
        "structure": case.structure,
        "logit_sd": case.logit_sd,
        "floor": floors,
        "rows": [],
    }


def key_of(table: Table) -> tuple[Any, ...]:
    return tuple(table[name] for name in KEY)


def write(
    path: Path, header: Mapping[str, Any], tables: Iterable[Table], *, notes: Iterable[str] = (), **more: Any
) -> None:
    """`path` as JSON and beside it the same as text."""
    tables = list(tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"header": dict(header), "notes": list(notes), "tables": tables, **more}
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".txt").write_text(text(header, tables, notes=notes) + "\n")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def merged(old: Iterable[Table], new: Iterable[Table]) -> list[Table]:
    """Tables of an earlier part of a run, replaced where there is a newer one."""
    tables = {key_of(table): table for table in old}
    tables |= {key_of(table): table for table in new}
    return list(tables.values())


def worst_of(runs: list[list[Table]]) -> list[Table]:
    """Of several process starts, every row's worst median; a row that failed once has failed.

    The first run's other figures are kept.
    """
    first, *others = runs
    result = []
    for table in first:
        same = [t for run in others for t in run if key_of(t) == key_of(table)]
        rows = []
        for row in table["rows"]:
            versions = [row] + [r for t in same for r in t["rows"] if r["name"] == row["name"]]
            failed = next((r for r in versions if r["match"] != "ok"), None)
            if failed is not None:
                rows.append(failed)
                continue
            worst = dict(row)
            for key in ("forward", "backward", "both"):
                timings = [r[key] for r in versions if r.get(key)]
                if timings:
                    worst[key] = max(timings, key=lambda t: t["median"])
            worst["restarts"] = len(versions)
            rows.append(worst)
        result.append({**table, "rows": rows})
    return result


def text(header: Mapping[str, Any], tables: Iterable[Table], *, notes: Iterable[str] = ()) -> str:
    """Header, notes, and every table."""
    parts = ["\n".join([*headline(dict(header)), *notes])]
    parts += [table_text(table, has_gpu=header["gpu"] is not None) for table in tables]
    return "\n\n".join(parts)


def table_text(table: Table, *, has_gpu: bool) -> str:
    """One table.

    Raises:
        TimesWithoutGpuError: a time without a GPU.
    """
    if not has_gpu:
        timed = [f"{row['name']}: {key}" for row in table["rows"] for key in TIME_KEYS if row.get(key) is not None]
        if timed or any("milliseconds" in f for f in table["floor"].values()):
            raise TimesWithoutGpuError(
                f"{title(table)}: times without a GPU ({', '.join(timed) or 'floor'}); "
                "a CPU's time is not a kernel's speed"
            )
    columns = GPU_COLUMNS if has_gpu else COUNT_COLUMNS
    best = best_library(table)
    lines = [[name for name, _ in columns]]
    for row in table["rows"]:
        lines.append([str(cell(row, table, best)) for _, cell in columns])
    return "\n".join([title(table), floor_text(table), grid(lines, left=[0])])


def title(table: Table) -> str:
    mode = "trained" if table["trained"] else "frozen"
    shape = SHAPES.get(table["shape"])
    note = f" ({shape.note})" if shape is not None and shape.note else ""
    parts = f"level={table['level']}  shape {table['description']}{note}  context={table['context']}  {mode}"
    if table["structure"] == "shared":
        parts += "  libraries with our structure"
    if table["logit_sd"] != 1.0:
        parts += f"  logits sd {table['logit_sd']:g}"
    return f"{parts}\n{LEVELS[table['level']]}"


def floor_text(table: Table) -> str:
    parts = []
    for direction, f in table["floor"].items():
        part = f"{direction} {f['flops'] / 1e9:.1f} GFLOP {f['bytes'] / 1e6:.0f} MB"
        if "milliseconds" in f:
            part += f" {f['milliseconds']:.3f} ms"
        parts.append(part)
    return "floor: " + ", ".join(parts)


def best_library(table: Table) -> dict[str, float]:
    """The fastest correct library row of every pass, in milliseconds."""
    best: dict[str, float] = {}
    for which in ("forward", "backward", "both"):
        times = [
            row[which]["median"]
            for row in table["rows"]
            if row["family"] == "library" and row["match"] == "ok" and row.get(which)
        ]
        if times:
            best[which] = min(times)
    return best


Cell = Callable[[dict[str, Any], Table, dict[str, float]], str]


def _time(which: str) -> Cell:
    def cell(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
        t = row.get(which)
        return "" if not t else f"{t['median']:.3f} ({t['p20']:.3f}-{t['p80']:.3f})"

    return cell


def _versus(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
    """How many times as fast as the fastest correct library row; forward / backward / both."""
    ratios = [
        f"{best[which] / row[which]['median']:.2f}" if row.get(which) and which in best else "-"
        for which in ("forward", "backward", "both")
    ]
    return "" if set(ratios) == {"-"} else "/".join(ratios)


def _floor_ms(table: Table, which: str) -> float:
    f = table["floor"]
    if which != "both":
        return f[which]["milliseconds"]
    return f["forward"]["milliseconds"] + f["backward"]["milliseconds"]


def _percent(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
    """Floor over time, in per cent: 100 would be perfect."""
    parts = [
        f"{100 * _floor_ms(table, which) / row[which]['median']:.0f}" if row.get(which) else "-"
        for which in ("forward", "backward", "both")
    ]
    return "" if set(parts) == {"-"} else "/".join(parts)


def _rate(unit: str, scale: float) -> Cell:
    def cell(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
        if not row.get("both"):
            return ""
        least = sum(f[unit] for f in table["floor"].values())
        return f"{least / (row['both']['median'] / 1e3) / scale:.0f}"

    return cell


def _plain(key: str, scale: float = 1.0, form: str = ".0f") -> Cell:
    def cell(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
        value = row.get(key)
        return "" if value is None else format(value / scale, form)

    return cell


def _pair(first: str, second: str, scale: float = 1.0, form: str = ".0f") -> Cell:
    def cell(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
        if row.get(first) is None:
            return ""
        return f"{format(row[first] / scale, form)}+{format(row[second] / scale, form)}"

    return cell


def _match(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
    return row["match"]


def _label(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
    return row["label"]


def _note(row: dict[str, Any], table: Table, best: dict[str, float]) -> str:
    attention = row.get("attention", ())
    names = attention if isinstance(attention, str) else ", ".join(attention)
    return "; ".join(text for text in (row.get("config"), names, row.get("why")) if text)


GPU_COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("impl", _label),
    ("match", _match),
    ("fwd ms (p20-p80)", _time("forward")),
    ("bwd ms", _time("backward")),
    ("f+b ms", _time("both")),
    ("graph f+b", _plain("graph_both", form=".3f")),
    ("wall f+b", _plain("wall_both", form=".2f")),
    ("vs best lib", _versus),
    ("% of floor", _percent),
    ("TFLOP/s", _rate("flops", 1e12)),
    ("GB/s", _rate("bytes", 1e9)),
    ("peak MB", _plain("peak_bytes", 1e6)),
    ("kernels", _pair("kernels_forward", "kernels_backward")),
    ("compile s", _plain("compile_seconds", form=".1f")),
    ("", _note),
)

COUNT_COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("impl", _label),
    ("match", _match),
    ("launches f+b", _pair("launches_forward", "launches_backward")),
    ("GFLOP f+b", _pair("flops_forward", "flops_backward", 1e9)),
    ("eager traffic MB f+b", _pair("traffic_forward", "traffic_backward", 1e6)),
    ("saved MB", _plain("saved", 1e6, ".1f")),
    ("", _note),
)
