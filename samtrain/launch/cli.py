"""The command line of the main job: read the recipe, check it, run it, say how it went.

Exit status: 0 success; 2 bad recipe or input (one message, nothing was trained); 1 failure (the first traceback);
143 after SIGTERM or Ctrl-C, with a checkpoint saved.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from samtrain.core.errors import EXIT_SUCCESS, EXIT_TERMINATED, SamtrainError
from samtrain.core.events import Emit
from samtrain.launch.failures import WorkersFailed
from samtrain.launch.progress_display import ProgressDisplay, make_console
from samtrain.launch.stop_request import StopRequest
from samtrain.launch.worker import Worker
from samtrain.recipe import Recipe, load_recipe


def main(argv: list[str] | None = None, *, worker: Worker | None = None) -> int:
    """Run the command line; returns the exit status. `worker` replaces what the processes run, for tests."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.print_config:
            print(recipe.to_yaml(), end="")
            return EXIT_SUCCESS
        with ProgressDisplay(make_console()) as display:
            return _launch(recipe, arguments, emit=display.handle, worker=worker)
    except SamtrainError as error:
        _report(error)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m samtrain.launch",
        description="Train a recipe: on the Ray cluster given, else on a Ray of this machine's own.",
        epilog="Exit status: 0 success, 1 failure, 2 bad recipe or input, 143 stopped with a checkpoint saved.",
    )
    parser.add_argument("recipe", type=Path, help="a YAML file, e.g. recipes/mini.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=1e-4")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the plan, stop before weights")
    parser.add_argument("--memory", action="store_true", help="a dry run that also predicts the memory of each GPU")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--local", action="store_true", help="plain processes on this machine, without Ray")
    parser.add_argument("--address", help="of a Ray cluster (default: RAY_ADDRESS, else a Ray of this machine's own)")
    return parser


def _launch(recipe: Recipe, arguments: argparse.Namespace, *, emit: Emit, worker: Worker | None) -> int:
    from samtrain.launch.output_dir import claim
    from samtrain.launch.preflight import preflight

    address = None if arguments.local else (arguments.address or cluster_from_environment())
    where = "this machine, without Ray" if arguments.local else f"the Ray cluster at {address}" if address else None
    where = where or "this machine, a Ray of its own"
    plan = preflight(recipe, where=where, emit=emit, is_here=address is None)
    if arguments.dry_run or arguments.memory:
        if arguments.memory:
            from samtrain.launch.memory_plan import plan_memory

            plan_memory(recipe, emit=emit)
        return EXIT_SUCCESS
    claim(plan.output)
    with StopRequest() as stop:
        if arguments.local:
            from samtrain.launch.local_backend import run_local

            summary = run_local(plan.output.recipe, emit=emit, stop=stop, worker=worker)
        else:
            from samtrain.launch.ray_backend import run_on_ray

            summary = run_on_ray(plan.output.recipe, address=address, emit=emit, stop=stop, worker=worker)
    emit(_summary_event(plan.output.recipe, summary))
    return EXIT_TERMINATED if summary.get("status") == "terminated" else EXIT_SUCCESS


def cluster_from_environment() -> str | None:
    """RAY_ADDRESS, which `ray job submit` sets for the job."""
    import os

    return os.environ.get("RAY_ADDRESS") or None


def _summary_event(recipe: Recipe, summary: dict[str, Any]) -> dict[str, Any]:
    title = f"{recipe.name}: {summary.get('status', 'finished')}"
    return {"kind": "summary", "title": title, "rows": summary.get("summary_rows", [])}


def _report(error: SamtrainError) -> None:
    if isinstance(error, WorkersFailed):
        failure = error.failure
        if not failure.for_users:
            print(f"\nrank {failure.rank} failed first:\n{failure.traceback}", file=sys.stderr)
        prefix = f"rank {failure.rank}: " if failure.rank >= 0 else ""
        kind = "" if failure.for_users else f"{failure.kind}: "
        print(f"samtrain: {prefix}{kind}{failure.message}", file=sys.stderr)
        return
    print(f"samtrain: {error}", file=sys.stderr)
