"""Everything a GPU has to tell, in the order of its value, in calls of limited length: `python -m benchmarks.gpu`.

    python -m benchmarks.gpu --list                                  the stages, and what is done
    python -m benchmarks.gpu --minutes 9.5 --archive OUT/gpu.tar.gz  what fits into this call; the same again goes on
    tar xzf gpu.tar.gz                                               at home, in the repository; then commit

Each stage is a process of its own with a limit, ends with its results written, and is marked in
results/gpu-stages.json; one that was cut off or failed is not marked done and runs again when it is its turn
(`--skip-failed`: not those that failed). The order: the headline, which is compared with others' code before it is
timed and may be all that a short loan of a GPU has room for; is the rest right; then breadth.

Needs beside this repository, which need not be installed: torch 2.11 or later for CUDA with its triton, transformers
5.17 or later, peft, numpy, pillow, safetensors, typer, pyyaml, pytest, pytest-timeout; and what `gpu-wheels.txt` lists,
where it is missing. In a copy without .git, SAMTRAIN_COMMIT names the commit in the results.
"""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "benchmarks" / "results" / "gpu-stages.json"
LOGS = "benchmarks/results/gpu-logs"
WHAT_COMES_BACK = ("benchmarks/results/**/*", "kernels/samtrain_kernels/*/configs/*.json")
OVERHEAD_SECONDS = 10  # to start a process and to pack the archive
TAIL_LINES = 12


@dataclass(frozen=True)
class Stage:
    """seconds: after which it is stopped. needs_gpu: False of what is computed from the others' files."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    why: str
    needs_gpu: bool = True


def _train(name: str, shape: str, train: str, *more: str, why: str, rounds_seconds: int = 240) -> Stage:
    command = ("-m", "benchmarks.train", "--shape", shape, "--train", train, "--seconds", str(rounds_seconds))
    return Stage(name, (*command, "--append", *more), 560, why)


def _kernels(name: str, *selection: str, why: str) -> Stage:
    return Stage(name, ("-m", "benchmarks.kernels", *selection, "--append"), 540, why)


STAGES = (
    _train(
        "train-7b-frozen", "7b", "frozen", "--extra", "data,checkpoint,first_step",
        why="the headline: MFU, ratios to InstructBLIP and the reference, data wait, checkpoint, first step",
        rounds_seconds=150,
    ),
    Stage(
        "tests", ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"), 300,
        "every kernel setting is right on this GPU",
    ),
    Stage(
        "golden-fp32", ("-m", "benchmarks.golden_loss", "--device", "cuda", "--record"), 300,
        "training agrees with the CPU's, step by step",
    ),
    _train(
        "train-7b-frozen-parts", "7b", "frozen",
        "--peer", "ours_dense,ours_no_liger,ours_eager_vision,ours_materialised",
        why="what each part of ours gains: kept or dropped",
    ),
    Stage("tune", ("-m", "benchmarks.tune"), 560, "tile sizes of this GPU; every setting checked"),
    _train("train-13b-frozen", "13b", "frozen", why="the second aim"),
    _train("train-7b-lora", "7b", "lora", why="the third aim"),
    _kernels("kernels-a", "--shape", "A", "--level", "op", "--level", "cross", why="the kernels' headline"),
    _train("train-7b-full", "7b", "full", why="everything but the tower trains"),
    _kernels("kernels-a-qformer", "--shape", "A", "--level", "qformer", "--level", "mix", why="the whole Q-Former"),
    _train("train-7b-frozen-long", "7b", "frozen", "--text", "long", why="long texts: what padding costs there"),
    _kernels("kernels-n", "--shape", "N", why="against the number of images: the figure"),
    *(
        _kernels(f"kernels-{s.lower()}", "--shape", s, "--level", "op", "--level", "cross", why=f"shape {s}")
        for s in "BCDEFG"
    ),
    _train("train-13b-lora", "13b", "lora", why="breadth"),
    Stage("scaling", ("-m", "benchmarks.scaling"), 560, "scaling from the parts measured here", needs_gpu=False),
)  # fmt: skip

Run = Callable[[Stage, Path], int | None]


class State:
    """Stage -> how it ended, in a file that travels with the results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def status(self, stage: Stage) -> str:
        return str(self.stages.get(stage.name, {}).get("status", "-"))

    def note(self, stage: Stage, **values: Any) -> None:
        self.stages[stage.name] = values
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.stages, indent=1) + "\n")


def run_stages(
    stages: Sequence[Stage],
    state: State,
    *,
    seconds: float,
    skip_failed: bool = False,
    run: Run,
    logs: Path,
    commit: str,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> bool:
    """Run what is not done, in order, leaving out what might not end within `seconds`. True: nothing is left to run."""
    end, is_complete = clock() + seconds, True
    for stage in stages:
        status = state.status(stage)
        if status == "ok" or (skip_failed and status == "failed"):
            continue
        if clock() + stage.seconds + OVERHEAD_SECONDS > end:
            is_complete = False
            continue
        say(f"--- {stage.name}: {stage.why} (at most {stage.seconds} s)")
        logs.mkdir(parents=True, exist_ok=True)
        log, since = logs / f"{stage.name}.log", clock()
        state.note(stage, status="cut off", commit=commit)  # what remains where this call is killed
        code = run(stage, log)
        status = "ok" if code == 0 else "failed" if code is not None else "cut off"
        is_complete &= status != "cut off"
        state.note(stage, status=status, seconds=round(clock() - since), exit_code=code, commit=commit)
        say("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
        say(f"--- {stage.name}: {status} after {clock() - since:.0f} s")
    return is_complete


def run_process(stage: Stage, log: Path) -> int | None:
    """Its exit code; None where it was stopped at its limit. Everything it prints goes into the log."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        try:
            return subprocess.run(
                [sys.executable, *stage.arguments], cwd=ROOT, env=environment, timeout=stage.seconds,
                stdout=stream, stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return None


def pack(archive: Path, *, since: float, root: Path = ROOT) -> list[str]:
    """Write the result files that are newer than `since` (seconds of the epoch), by their places in the repository."""
    found = sorted({p for pattern in WHAT_COMES_BACK for p in root.glob(pattern) if p.is_file()})
    names = [str(p.relative_to(root)) for p in found if p.stat().st_mtime >= since]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            tar.add(root / name, arcname=name)
    return names


def table(stages: Iterable[Stage], state: State) -> str:
    return "\n".join(f"{s.name:22} {state.status(s):8} {s.seconds:4d} s  {s.why}" for s in stages)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    minutes: Annotated[float, typer.Option(help="this call ends by then", min=0.1)] = 9.7,
    stage: Annotated[list[str] | None, typer.Option(help="only these, whether done or not")] = None,
    skip_failed: Annotated[bool, typer.Option(help="do not try again what failed")] = False,
    archive: Annotated[Path | None, typer.Option(help="tar.gz of the result files this call has changed")] = None,
    list_stages: Annotated[bool, typer.Option("--list", help="say what is done and end")] = False,
) -> None:
    began, state = time.time(), State(STATE)
    if unknown := set(stage or ()) - {s.name for s in STAGES}:
        raise typer.BadParameter(
            f"--stage {', '.join(sorted(unknown))}: choose from {', '.join(s.name for s in STAGES)}"
        )
    chosen = [s for s in STAGES if not stage or s.name in stage]
    if list_stages:
        print(table(chosen, state))
        return
    if any(s.needs_gpu for s in chosen) and not _has_gpu():
        print("benchmarks.gpu: torch sees no CUDA device here; no time is taken without one", file=sys.stderr)
        raise typer.Exit(2)
    if stage:
        for one in chosen:
            state.stages.pop(one.name, None)
    shortest = min(s.seconds for s in chosen) + OVERHEAD_SECONDS
    if 60 * minutes < shortest:
        raise typer.BadParameter(f"--minutes {minutes:g}: the shortest stage may take {shortest / 60:.1f}")
    is_complete = run_stages(
        chosen, state, seconds=60 * minutes, skip_failed=skip_failed, run=run_process, logs=ROOT / LOGS,
        commit=_commit(), say=lambda line: print(line, flush=True),
    )  # fmt: skip
    if archive is not None:
        print(f"{archive}: {len(pack(archive, since=began))} files")
    print(table(chosen, state))
    if not is_complete:
        print("not all of it has run: call it again")
    if any(state.status(s) == "failed" for s in chosen):
        raise typer.Exit(1)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _commit() -> str:
    from samtrain.core.versions import git_commit

    return git_commit()


if __name__ == "__main__":
    app()
