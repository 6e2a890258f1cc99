"""Times of whole steps on a GPU, and nowhere else.

Rows take turns: in every round each makes its optimizer, runs one step that is not timed, then some that are, and gives
its optimizer back, so that full training of several models fits and a drifting clock moves all alike. A row that runs
out of memory says so and is left out of later rounds.
"""

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.kernels.measure import EventTimer, Timing
from benchmarks.train.loops import Loop
from benchmarks.train.phases import PARTS, Phases, by_part, watching

ROUNDS = 6
STEPS = 5
GIB = 2**30


def failure(error: Exception) -> dict[str, str]:
    """Of a row: one that fails must not cost the others their figures. The traceback goes to stderr."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory", "why": str(error).split(". ")[0]}
    traceback.print_exception(error)
    lines = str(error).strip().splitlines() or [""]
    return {"status": "error", "why": f"{type(error).__name__}: {lines[0]}"[:200]}


def measure_rows(
    loops: Mapping[str, Loop],
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    seconds: float | None = None,
    timer: Any = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, dict[str, Any]]:
    """Name -> {"step": Timing of one step, "peak_bytes"} or {"status": "out of memory" or "error", "why"}.

    Args:
        seconds: no round begins that would end later, as long as the longest so far took; the first always runs.
    """
    timer = timer or EventTimer()
    began, longest = clock(), 0.0
    found: dict[str, dict[str, Any]] = {name: {} for name in loops}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for i in range(rounds):
        since = clock()
        if i and seconds is not None and since + longest > began + seconds:
            break
        for name, loop in loops.items():
            if "status" in found[name]:
                continue
            try:
                with active(loop):
                    reset_peak(loop)
                    loop.step()
                    start = timer.mark()
                    for _ in range(steps):
                        loop.step()
                    times[name].append(timer.milliseconds(start, timer.mark()) / steps)
                    found[name]["peak_bytes"] = max(found[name].get("peak_bytes", 0), peak(loop))
            except Exception as error:
                found[name] = failure(error)
            free()
        longest = max(longest, clock() - since)
    for name, values in times.items():
        if values and "status" not in found[name]:
            found[name]["step"] = Timing.of(values, reps=steps).to_dict()
    return found


class active:
    """The loop with its optimizer, inside."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __enter__(self) -> Loop:
        self.loop.activate()
        return self.loop

    def __exit__(self, *_: Any) -> None:
        self.loop.release()


def breakdown(loop: Loop, *, steps: int = 3, timer: Any = None) -> dict[str, Any]:
    """{"parts": part -> ms of a step, "phases": phase -> ms}, medians over steps, in an active loop."""
    timer = timer or EventTimer()
    seen: list[dict[str, float]] = []
    for _ in range(steps):
        phases = Phases(timer)
        with watching(loop, phases):
            loop.step()
        seen.append(phases.milliseconds())
    names = list(dict.fromkeys(name for one in seen for name in one))
    middle = {name: sorted(one.get(name, 0.0) for one in seen)[len(seen) // 2] for name in names}
    parts = by_part(middle)
    return {"phases": middle, "parts": {part: parts[part] for part in PARTS}}


def trace(loop: Loop, path: str) -> None:
    """One step as a Chrome trace (chrome://tracing, Perfetto), in an active loop that is warm."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        loop.step()
        synchronize(loop)
    profiler.export_chrome_trace(path)


def synchronize(loop: Loop) -> None:
    if loop.setting.device.type == "cuda":
        torch.cuda.synchronize(loop.setting.device)


def reset_peak(loop: Loop) -> None:
    if loop.setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(loop.setting.device)


def peak(loop: Loop) -> int:
    """Most bytes allocated since `reset_peak`, what other rows keep (their float32 copies) included; 0 on a CPU."""
    if loop.setting.device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(loop.setting.device)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
