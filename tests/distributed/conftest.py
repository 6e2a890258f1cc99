"""Real processes for distributed tests.

`launch` runs a scenario of `scenarios.py` on several gloo ranks. The processes are forked from a server that has
imported torch and deepspeed once, so that a rank starts in a moment instead of ten seconds.
"""

import json
import multiprocessing
import os
import runpy
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = Path(__file__).with_name("scenarios.py")


class Outcome:
    """exit_codes by rank; results by rank (None where a rank left none); logs by rank."""

    def __init__(self, exit_codes: list[int | None], results: list[Any], logs: list[str]) -> None:
        self.exit_codes, self.results, self.logs = exit_codes, results, logs

    def check(self) -> "Outcome":
        assert all(code == 0 for code in self.exit_codes), f"{self.exit_codes}\n" + "\n".join(self.logs)
        return self


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "deepspeed",
            "deepspeed.runtime.zero.muon.muon_optimizer",
            "samtrain.engine.trainer",
            "samtrain.model",
        ]
    )

    def run(scenario: str, *, world_size: int, timeout: float = 120, **settings: Any) -> Outcome:
        folder = tmp_path_factory.mktemp(scenario)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(world_size):
            config = {"scenario": scenario, "rank": rank, "world_size": world_size, "port": port}
            config |= {"folder": str(folder), "settings": settings}
            process = context.Process(target=runpy.run_path, args=(str(SCENARIOS), {"CONFIG": config}, "__scenario__"))
            process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        logs = [_read(folder / f"log-{rank}.txt") for rank in range(world_size)]
        assert not hanging, f"ranks {hanging} hang after {timeout} s\n" + "\n".join(logs)
        results = [json.loads(_read(folder / f"result-{rank}.json") or "null") for rank in range(world_size)]
        return Outcome([process.exitcode for process in processes], results, logs)

    return run


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
