"""Tables of whole steps: JSON that holds everything, and text for people. Without a GPU no time is written."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.grid import grid
from benchmarks.kernels.report import TimesWithoutGpuError
from benchmarks.train.lengths import TEXTS
from benchmarks.train.measure import GIB

Table = dict[str, Any]
Row = dict[str, Any]
KEY = ("shape", "train", "text", "context", "layers", "checkpointing", "compared")
TIME_KEYS = ("step", "breakdown")
YARDSTICKS = ("reference", "instructblip")


def write(path: Path, header: Mapping[str, Any], tables: Iterable[Table]) -> None:
    """`path` as JSON and beside it the same as text.

    Raises:
        TimesWithoutGpuError: a time under a header without a GPU.
    """
    tables = list(tables)
    whole = text(header, tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": dict(header), "tables": tables}, indent=1) + "\n")
    path.with_suffix(".txt").write_text(whole + "\n")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def merged(old: Iterable[Table], new: Iterable[Table]) -> list[Table]:
    """Earlier tables, replaced where there is a newer one of the same setting."""
    tables = {_key(table): table for table in old} | {_key(table): table for table in new}
    return list(tables.values())


def text(header: Mapping[str, Any], tables: Iterable[Table]) -> str:
    return "\n\n".join(["\n".join(headline(header)), *(table_text(table, header) for table in tables)])


def headline(header: Mapping[str, Any]) -> list[str]:
    v = header["versions"]
    software = f"torch {v['torch']} triton {v['triton']} transformers {v['transformers']} deepspeed {v['deepspeed']}"
    software += f" | commit {header['commit'][:12]}"
    if header["gpu"] is None:
        return [
            "NO GPU: this machine has none, and no GPU has run what follows.",
            "Here: arithmetic, launches and memory of the real shape, counted on tensors without data; correctness on",
            "a toy shape. No times: a CPU's say nothing about a step.",
            "match: loss and gradients of a step in float32 at toy widths, against the row's yardstick.",
            "useful: real work (no padding, causal attention at half) of the executed arithmetic. peak: without the",
            "allocator's rounding, workspaces and the CUDA context.",
            software,
        ]
    smi = header["smi"]
    gpu = f"{header['gpu']} {header['memory_bytes'] / 1e9:.0f} GB | driver {smi.get('driver_version', '?')}"
    gpu += f" | clocks {smi.get('clocks.sm', '?')} of {smi.get('clocks.max.sm', '?')} | {smi.get('power.limit', '?')}"
    return [
        gpu,
        f"{software} | CUDA {header['cuda']}",
        f"MFU against {header['peak_tflops']:.0f} TFLOP/s ({header['peak_source']}); matmul measured in this run: "
        f"{header['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s",
    ]


def table_text(table: Table, header: Mapping[str, Any]) -> str:
    """One table.

    Raises:
        TimesWithoutGpuError: a time without a GPU.
    """
    if header["gpu"] is None:
        timed = [f"{row['name']}: {key}" for row in table["rows"] for key in TIME_KEYS if row.get(key)]
        if timed or table.get("extras"):
            raise TimesWithoutGpuError(f"{title(table)}: times without a GPU ({', '.join(timed) or 'extras'})")
        return "\n".join([title(table), _work_text(table), grid(_counted_rows(table), left=[0])])
    parts = [title(table), _work_text(table), grid(_timed_rows(table, header), left=[0])]
    parts += [_breakdown_text(table, header), _extras_text(table)]
    return "\n".join(part for part in parts if part)


def title(table: Table) -> str:
    initial, contextual = table["layers"]
    parameters = table["parameters"]
    checkpointing = ", gradient checkpointing" if table["checkpointing"] else ""
    return (
        f"{table['shape']} ({table['note']}), {table['train']}: {parameters['trainable'] / 1e6:,.1f} M of "
        f"{parameters['all'] / 1e6:,.0f} M parameters train{checkpointing}; guidance {table['context']}, "
        f"l = {initial}, k = {contextual}\n{table['data']['description']}; {TEXTS[table['text']]}"
    )


def _work_text(table: Table) -> str:
    """What a step of ours must compute, part by part."""
    work = next(row["work"] for row in table["rows"] if row["name"] == "ours")
    total = sum(work.values())
    parts = ", ".join(f"{part} {flops / 1e12:.1f} ({100 * flops / total:.1f} %)" for part, flops in work.items())
    return f"real work of ours: {total / 1e12:.1f} TFLOP: {parts}"


def mfu(row: Row, seconds: float, header: Mapping[str, Any]) -> float:
    return sum(row["work"].values()) / seconds / (header["peak_tflops"] * 1e12)


def speed(table: Table, row: Row, unit: str) -> float:
    """Samples, images or (real) tokens a second."""
    return table["data"][unit] / (row["step"]["median"] / 1e3)


def _timed_rows(table: Table, header: Mapping[str, Any]) -> list[list[str]]:
    columns = ["impl", "match", "samples/s", "images/s", "tokens/s", "step ms (p20-p80)", "MFU %"]
    columns += [f"x {name}" for name in YARDSTICKS] + ["real tokens %", "peak GiB", ""]
    by_name = {row["name"]: row for row in table["rows"]}
    lines = [columns]
    for row in table["rows"]:
        if not row.get("step"):
            lines.append([row["label"], row["match"], *[""] * 9, f"{row.get('status', '')} {row['why']}".strip()])
            continue
        t = row["step"]
        ratios = [
            f"{by_name[name]['step']['median'] / t['median']:.2f}" if by_name.get(name, {}).get("step") else "-"
            for name in YARDSTICKS
        ]
        lines.append(
            [
                row["label"],
                row["match"],
                f"{speed(table, row, 'samples'):.1f}",
                f"{speed(table, row, 'images'):.1f}",
                f"{speed(table, row, 'tokens'):.0f}",
                f"{t['median']:.1f} ({t['p20']:.1f}-{t['p80']:.1f})",
                f"{100 * mfu(row, t['median'] / 1e3, header):.1f}",
                *ratios,
                f"{100 * table['data']['tokens'] / row['num_padded_tokens']:.0f}",
                f"{row['peak_bytes'] / GIB:.1f}",
                row["why"],
            ]
        )
    return lines


def _breakdown_text(table: Table, header: Mapping[str, Any]) -> str:
    """ms, share of the step and MFU of every part, row by row."""
    rows = [row for row in table["rows"] if row.get("breakdown")]
    if not rows:
        return ""
    parts = list(rows[0]["breakdown"]["parts"])
    lines = [["ms, share of the step, MFU", *parts]]
    for row in rows:
        times = row["breakdown"]["parts"]
        whole = sum(times.values())
        cells = []
        for part in parts:
            cell = f"{times[part]:.1f} {100 * times[part] / whole:.0f} %"
            if row["work"].get(part) and times[part]:
                cell += f" {100 * row['work'][part] / (times[part] / 1e3) / (header['peak_tflops'] * 1e12):.0f} %"
            cells.append(cell)
        lines.append([row["label"], *cells])
    return grid(lines, left=[0])


def _extras_text(table: Table) -> str:
    lines = []
    extras = table.get("extras", {})
    ours = next((row for row in table["rows"] if row["name"] == "ours" and row.get("step")), None)
    for name, found in extras.items():
        if "absent" in found or "error" in found:
            lines.append(f"{name}: {found.get('absent') or found['error']}")
        elif name == "data":
            share = found["wait_seconds"] / found["seconds"]
            lines.append(
                f"data wait: {100 * share:.2f} % of {found['seconds']:.1f} s ({found['steps']} steps, "
                f"{found['num_workers']} decoding threads, 640 x 480 JPEG)"
            )
        elif name == "checkpoint":
            step = ours["step"]["median"] / 1e3 if ours else None
            steps = f" ({found['stall_seconds'] / step:.2f} steps)" if step else ""
            beside = found["steps_beside_seconds"] / found["steps_beside"]
            slower = f", {beside / step:.2f} times a step without" if step else ""
            lines.append(
                f"checkpoint of {found['bytes'] / 1e9:.2f} GB: training stood still for {found['stall_seconds']:.2f} s"
                f"{steps}; complete after {found['seconds']:.1f} s, {found['steps_beside']} steps meanwhile of "
                f"{beside:.3f} s{slower}; host memory made before the first step in {found['prepare_seconds']:.1f} s"
            )
        elif name == "first_step":
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found["stages_seconds"].items())
            lines.append(
                f"first step after {found['stages_seconds']['first step']:.1f} s from the process's start, "
                f"{found['weight_bytes'] / 1e9:.1f} GB of weights in a warm file cache ({stages})"
            )
    return "\n".join(lines)


def _counted_rows(table: Table) -> list[list[str]]:
    columns = [
        "impl",
        "match",
        "real TFLOP",
        "executed TFLOP",
        "useful %",
        "launches",
        "real tokens %",
        "micro-batches",
    ]
    columns += ["weights GiB", "optimizer GiB", "peak GiB", ""]
    lines = [columns]
    for row in table["rows"]:
        real = sum(row["work"].values())
        counts = row.get("counts")
        if counts is None:
            lines.append([row["label"], row["match"], f"{real / 1e12:.2f}", *[""] * 8, row["why"]])
            continue
        lines.append(
            [
                row["label"],
                row["match"],
                f"{real / 1e12:.2f}",
                f"{counts['executed_flops'] / 1e12:.2f}",
                f"{100 * real / counts['executed_flops']:.0f}",
                str(counts["launches"]),
                f"{100 * table['data']['tokens'] / counts['num_padded_tokens']:.0f}",
                str(counts["num_micro_batches"]),
                f"{counts['weights'] / GIB:.2f}",
                f"{counts['optimizer'] / GIB:.2f}",
                f"{counts['peak'] / GIB:.2f} ({counts['peak_phase']})",
                row["why"],
            ]
        )
    return lines


def _key(table: Table) -> tuple[Any, ...]:
    return tuple(str(table[name]) for name in KEY)
