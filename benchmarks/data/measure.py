"""Measurements, each in fresh processes on the same cores."""

import importlib.machinery
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.data.child import Job
from benchmarks.data.corpus import Corpus
from benchmarks.data.gate import Gate
from benchmarks.data.rows import REPRESENTATIVES, ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
Say = Callable[[str], None]
Result = dict[str, Any]
_POLL_SECONDS = 0.25
_LIMIT_SECONDS = 900


class ChildFailedError(RuntimeError):
    """A measurement's process failed; the message ends with its last words."""


@dataclass(frozen=True)
class Bench:
    """Where and how rows are run. peers: folder of packages beside our own, or None."""

    corpus: Corpus
    cores: list[int]
    batch_size: int
    peers: Path | None
    say: Say

    def missing(self, row: Row) -> str:
        """What a row needs and is not installed; empty where it can run."""
        places = [str(self.peers)] if self.peers else []
        finder = importlib.machinery.PathFinder
        absent = [
            name
            for name in row.requires
            if importlib.util.find_spec(name) is None and finder.find_spec(name, places) is None
        ]
        return f"{', '.join(absent)} not installed (make bench-data installs it)" if absent else ""

    def job(self, row: Row, kind: str, **more: Any) -> Job:
        job = Job(
            kind=kind,
            loader=row.loader,
            square=row.square,
            folder=str(self.corpus.folder),
            num_workers=len(self.cores),
            batch_size=self.batch_size,
            cores=self.cores,
            peers=str(self.peers or ""),
        )
        return replace(job, **more)

    def rate(self, row: Row) -> Result:
        """One timed epoch."""
        if row.processes == 1:
            return run_jobs([self.job(row, "rate")])[0]
        count = len(self.cores)  # as many processes of one thread as others have workers
        jobs = [self.job(row, "rate", rank=rank, world_size=count, num_workers=1) for rank in range(count)]
        answers = run_jobs(jobs)
        return {
            "images_per_second": sum(answer["images_per_second"] for answer in answers),
            "cpu_ms_per_image": statistics.mean(answer["cpu_ms_per_image"] for answer in answers),
            "first_seconds": max(answer["first_seconds"] for answer in answers),
            "import_seconds": max(answer["import_seconds"] for answer in answers),
        }


def run_jobs(
    jobs: Sequence[Job], *, watch: Callable[[list[subprocess.Popen[str]]], None] | None = None
) -> list[Result]:
    """Answers of processes that run at the same time.

    Raises:
        ChildFailedError: one failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        processes, outputs = [], []
        for n, job in enumerate(jobs):
            out, err = Path(folder) / f"{n}.out", Path(folder) / f"{n}.err"
            outputs.append((out, err))
            with out.open("w") as stdout, err.open("w") as stderr:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.data.child", job.to_json()],
                        cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, text=True,
                    )
                )  # fmt: skip
        try:
            if watch is not None:
                watch(processes)
            answers = []
            for job, process, (out, err) in zip(jobs, processes, outputs):
                code = process.wait(_LIMIT_SECONDS)
                lines = [line for line in out.read_text().splitlines() if line.startswith("{")]
                if code or not lines:
                    words = err.read_text().strip().splitlines()[-3:] or ["(nothing on standard error)"]
                    raise ChildFailedError(f"{job.kind} of {job.loader}: exit code {code}: {' | '.join(words)}")
                answers.append(json.loads(lines[-1]))
            return answers
        finally:
            for process in processes:
                if process.poll() is None:
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                    process.kill()
                    process.wait()


def check(bench: Bench, row: Row, gate: Gate) -> Result:
    """match, why and difference of a row."""
    if why := bench.missing(row):
        return {"match": "absent", "why": why}
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "pixels.npz"
            found = run_jobs([bench.job(row, "check", check_keys=gate.check_keys, out=str(out))])[0]
            verdict = gate.judge(found, out)
    except ChildFailedError as error:
        return {"match": "error", "why": str(error)}
    return {"match": "ok" if verdict.is_ok else "FAIL", "why": verdict.why, "difference": verdict.difference}


def load_rows(bench: Bench, names: Sequence[str], *, rounds: int) -> list[Result]:
    """The loading table: every row checked, then `rounds` rounds in which all rows take turns."""
    gate = Gate(bench.corpus)
    results: dict[str, Result] = {}
    for name in names:
        row = ROWS[name]
        results[name] = {"name": name, "label": row.label, "family": row.family, "settings": row.settings}
        results[name] |= check(bench, row, gate)
        bench.say(f"check {row.label}: {results[name]['match']} {results[name]['why']}".rstrip())
    fit = [name for name in names if results[name]["match"] == "ok"]
    samples: dict[str, list[Result]] = {name: [] for name in fit}
    for n in range(rounds):
        since = time.monotonic()
        turn = n % max(1, len(fit))
        for name in fit[turn:] + fit[:turn]:  # another one begins each round
            samples[name].append(bench.rate(ROWS[name]))
        bench.say(f"round {n + 1} of {rounds}: {time.monotonic() - since:.0f} s")
    for name in fit:
        for key in ("images_per_second", "cpu_ms_per_image", "first_seconds", "import_seconds"):
            results[name][key] = spread([sample[key] for sample in samples[name]])
    return list(results.values())


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def memory(bench: Bench, name: str, *, epochs: int) -> Result:
    """Proportional set size of a loader's processes over several epochs: peak, and slope after the first tenth."""
    samples: list[tuple[float, float]] = []

    def watch(processes: list[subprocess.Popen[str]]) -> None:
        while processes[0].poll() is None:
            if size := _tree_bytes(processes[0].pid):
                samples.append((time.monotonic(), size))
            time.sleep(_POLL_SECONDS)

    answer = run_jobs([bench.job(ROWS[name], "memory", epochs=epochs)], watch=watch)[0]
    first, last = answer["first_at"], answer["ended_at"]  # of the same clock: CLOCK_MONOTONIC is the machine's
    start = first + 0.1 * (last - first)
    steady = [(at, size) for at, size in samples if start <= at <= last]
    result = {"name": name, "label": ROWS[name].label, "epochs": epochs, "images": answer["num_images"]}
    during = [size for at, size in samples if at <= last]
    result["peak_bytes"] = max(during, default=None)
    if len(steady) >= 8:
        at, size = np.array(steady).T
        bytes_per_second = float(np.polyfit(at - at[0], size, 1)[0])
        result["bytes_per_image"] = bytes_per_second * (last - first) / answer["num_images"]
    return result


def resume(bench: Bench, name: str) -> Result:
    """Half an epoch, then the rest in a new process: time to its first batch, and whether each key came once."""
    row = ROWS[name]
    total = len(bench.corpus.index)
    round_size = bench.batch_size * len(bench.cores)
    half = max(round_size, total // 2 // round_size * round_size)
    first = run_jobs([bench.job(row, "state", num_seen=half)])[0]
    num_seen = len(first["keys"])
    rest = run_jobs([bench.job(row, "resume", state=first["state"], num_seen=num_seen)])[0]
    wrong = Gate(bench.corpus, num_checked=1).wrong_keys(first["keys"] + rest["keys"], first["counts"] + rest["counts"])
    return {
        "name": name,
        "label": row.label,
        "num_seen": num_seen,
        "first_seconds_at_start": first["first_seconds"],
        "first_seconds_resumed": rest["first_seconds"],
        "has_state": first["state"] is not None,
        "wrong": wrong,
    }


def first_of_large(bench: Bench, folder: Path, *, num_samples: int) -> list[Result]:
    """Ours on a set of many samples: seconds from opening the index to the first batch, at several places."""
    results = []
    size = bench.batch_size
    for share in (0.0, 0.5, 1.0):
        position = max(0, min(int(share * num_samples), num_samples - size)) // size * size
        job = replace(bench.job(ROWS["ours"], "first", num_seen=position), folder=str(folder))
        results.append({"position": position, "first_seconds": run_jobs([job])[0]["first_seconds"]})
    return results


def warm(folder: Path) -> None:
    """Read every file once, so that all rows find them in memory."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def representatives(results: Sequence[Result]) -> list[str]:
    """The rows that memory and resuming are measured of."""
    fit = {row["name"] for row in results if row["match"] == "ok"}
    return [name for name in REPRESENTATIVES if name in fit]


def _tree_bytes(pid: int) -> int:
    """Of a process and its children: memory that several share is counted once."""
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, AttributeError):
            continue
    return total
