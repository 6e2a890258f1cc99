"""What the compiler makes of every kernel setting, without a GPU: registers, spills, shared memory, tensor cores.

    python -m benchmarks.aot             every shipped setting, for the chip its file is for
    python -m benchmarks.aot --search    and every setting the tuner may try, for each chip
    ... --search --grid context_forward  and the grid it was chosen from: which candidates are pruned, and why

Writes benchmarks/results/aot.json and aot.txt; exit code 1 when a shipped setting, or one of the tuner's search space,
must not be used. These are facts about machine code. None of them is a speed, and none says that a GPU ran it.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samtrain_kernels.aot import AotReport, aot_cases, compile_case, source_digest
from samtrain_kernels.settings import (
    CONTEXT_KERNELS,
    DEFAULT_CAPABILITIES,
    DTYPES,
    PATCH_KERNELS,
    SEARCH_SPACES,
    KernelSetting,
    PatchSetting,
    capability_of,
    load,
    settings_files,
)

from benchmarks.grid import grid

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
KERNELS = CONTEXT_KERNELS + PATCH_KERNELS

SEARCH_HEAD_DIM = 64
"""The Q-Former's. The tuner runs at this width; other widths keep the defaults."""


@dataclass(frozen=True)
class Job:
    """One setting to compile, in all variants of the kernel or in the first alone."""

    kernel: str
    setting: KernelSetting | PatchSetting
    head_dim: int | None
    dtype: str
    capability: tuple[int, int]
    all_variants: bool = True


def shipped_jobs() -> list[Job]:
    """Every row of every settings file, for the chip of its file; equal rows once."""
    jobs = [
        Job(row.kernel, row.setting, row.head_dim, row.dtype, capability_of(path))
        for path in settings_files()
        for row in load(path)
    ]
    return list(dict.fromkeys(jobs))


def candidate_jobs(grids: Sequence[str]) -> list[Job]:
    """The search space, and for the kernels named in `grids` the grid it was chosen from, in bfloat16.

    All variants of what is in the search space; of the rest the first, which is enough to see a spill.
    """
    return [
        Job(
            kernel,
            setting,
            SEARCH_HEAD_DIM if kernel in CONTEXT_KERNELS else None,
            "bfloat16",
            capability,
            all_variants=setting in SEARCH_SPACES[capability][kernel],
        )
        for kernel in KERNELS
        for capability in DEFAULT_CAPABILITIES
        for setting in dict.fromkeys([*SEARCH_SPACES[capability][kernel], *(_grid(kernel) if kernel in grids else [])])
    ]


def _grid(kernel: str) -> Iterable[KernelSetting | PatchSetting]:
    """Two stages throughout, which keeps the table short; the search space adds a few others."""
    if kernel in PATCH_KERNELS:
        return [PatchSetting(rows, columns, 4, 2) for rows in (4, 8, 16, 32) for columns in (128, 256, 512)]
    contexts = (1,) if kernel == "context_kv_grad" else (1, 2, 4)
    return [
        KernelSetting(images, patches, warps, 2) for images in contexts for patches in (32, 64, 128) for warps in (4, 8)
    ]


def compile_job(job: Job) -> list[dict[str, Any]]:
    """The rows of one job, one for each variant."""
    dtype = DTYPES[job.dtype]
    cases = aot_cases(job.kernel, job.setting, head_dim=job.head_dim, dtype=dtype)[: None if job.all_variants else 1]
    return [row_of(compile_case(case, capability=job.capability, head_dim=job.head_dim, dtype=dtype)) for case in cases]


def row_of(report: AotReport) -> dict[str, Any]:
    return asdict(report) | {"capability": list(report.capability), "problems": report.problems()}


def compile_all(jobs: Sequence[Job], *, processes: int = 1) -> list[dict[str, Any]]:
    if processes == 1:
        return _collected(map(compile_job, jobs), len(jobs))
    # Spawned, not forked: a forked child would share the state of torch's threads.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return _collected(pool.map(compile_job, jobs), len(jobs))


def _collected(results: Iterable[list[dict[str, Any]]], total: int) -> list[dict[str, Any]]:
    rows = []
    for number, of_job in enumerate(results, 1):
        rows.extend(of_job)
        print(f"\r{number} of {total} settings", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def in_search_space(row: dict[str, Any]) -> bool:
    """Whether the tuner may try this setting on this chip."""
    space = SEARCH_SPACES[tuple(row["capability"])][row["kernel"]]
    return any(row["setting"] == asdict(setting) for setting in space)


def table(rows: Sequence[dict[str, Any]], *, is_search: bool) -> str:
    """Text table; `verdict` is ok, what is wrong, or (search) why a candidate is not in the search space."""
    head = ("kernel", "variant", "gpu", "dtype", "D", "setting", "regs", "spill ld/st", "smem KiB", "mma", "wgmma")
    lines = [(*head, "cp.async", "verdict")]
    for row in rows:
        names = {"images_per_block": "IB", "block_patches": "BP", "block_rows": "BR", "block_columns": "BC"}
        short = names | {"num_warps": "w", "num_stages": "s"}
        verdict = "; ".join(row["problems"]) or "ok"
        if is_search and not in_search_space(row):
            verdict = f"pruned: {verdict}" if row["problems"] else "ok, left out"
        lines.append(
            (
                row["kernel"],
                row["variant"] or "-",
                "sm_{}{}".format(*row["capability"]),
                row["dtype"],
                str(row["head_dim"] or "-"),
                " ".join(f"{short[name]}{value}" for name, value in row["setting"].items()),
                str(row["registers"]),
                f"{row['spill_loads']}/{row['spill_stores']}",
                f"{row['shared_bytes'] / 1024:.1f}",
                str(row["mma_sync"]),
                str(row["wgmma"]),
                str(row["async_copies"]),
                verdict,
            )
        )
    return grid(lines)


def report(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            "Kernels compiled ahead of time. No GPU has run any of it; nothing here is a speed.",
            f"triton {result['triton']}, torch {result['torch']}, commit {result['commit'][:12]}"
            + (" with changes to kernels/" if result["kernels_changed_since_commit"] else ""),
            "",
            "Shipped settings",
            table(result["shipped"], is_search=False),
            "",
            "Candidates of the tuner (bfloat16)",
            table(result["search"], is_search=True) if result["search"] else "not compiled: run with --search",
            "",
        ]
    )


def header() -> dict[str, Any]:
    """What the figures belong to."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "note": "compiled ahead of time; no GPU has run any of it",
        "triton": importlib.metadata.version("triton"),
        "torch": importlib.metadata.version("torch"),
        "commit": commit.stdout.strip() or "unknown",
        "kernels_changed_since_commit": bool(changed.stdout.strip()),
        "sources": {kernel: source_digest(kernel) for kernel in KERNELS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="compile every setting the tuner may try too")
    parser.add_argument("--grid", nargs="+", choices=KERNELS, default=[], help="with --search: kernels to compile wide")
    parser.add_argument("--processes", type=int, default=1, help="compilers at once (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of aot.json and aot.txt")
    options = parser.parse_args(arguments)

    result = header()
    result["shipped"] = compile_all(shipped_jobs(), processes=options.processes)
    if options.search:
        result["search"] = compile_all(candidate_jobs(options.grid), processes=options.processes)
    else:
        result["search"] = _kept_search(options.output / "aot.json", result)

    text = report(result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "aot.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / "aot.txt").write_text(text, encoding="utf-8")
    print(text)
    wrong = [row for row in result["shipped"] if row["problems"]]
    wrong += [row for row in result["search"] if row["problems"] and in_search_space(row)]
    for row in wrong:
        print(f"must not be used: {row['kernel']} {row['setting']}: {'; '.join(row['problems'])}", file=sys.stderr)
    return 1 if wrong else 0


def _kept_search(path: Path, fresh: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates of the last search, if they were compiled from this code by this compiler."""
    if not path.is_file():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    is_same = all(old.get(name) == fresh[name] for name in ("sources", "triton"))
    return list(old["search"]) if is_same else []


if __name__ == "__main__":
    sys.exit(main())
