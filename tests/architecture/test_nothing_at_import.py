"""Importing samtrain does no work: no heavy libraries, no environment changes, no log handlers, no threads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import importlib, json, logging, os, pkgutil, random, sys, threading
import rich.live, rich.progress, rich.style, rich.table, torch, transformers, typer  # theirs: rich draws numbers
heavy = {names}
environment = dict(os.environ)
root_handlers, threads = list(logging.root.handlers), threading.active_count()
state, torch_state = random.getstate(), torch.get_rng_state()
import samtrain, samtrain_kernels
skipped = []
for package in (samtrain, samtrain_kernels):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            if (error.name or "").split(".")[0] != "triton":
                raise
            skipped.append(found.name)
loggers = logging.root.manager.loggerDict.items()
mine = [n for n, logger in loggers if n.startswith("samtrain") and getattr(logger, "handlers", [])]
print(json.dumps({{
    "loaded": sorted(name for name in heavy if name in sys.modules),
    "environment": sorted(k for k in {{**environment, **os.environ}} if environment.get(k) != os.environ.get(k)),
    "handlers": mine + (["root"] if logging.root.handlers != root_handlers else []),
    "threads": threading.active_count() - threads,
    "random": random.getstate() != state or not torch.equal(torch.get_rng_state(), torch_state),
    "skipped": skipped,
}}))
"""


@pytest.fixture(scope="module")
def probed() -> dict[str, object]:
    probe = PROBE.format(names=["deepspeed", "ray", "mlflow", "matplotlib"])
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_importing_every_module_loads_no_heavy_library(probed: dict[str, object]) -> None:
    assert probed["loaded"] == []


# torch sets it when transformers makes it import torch._inductor.
NOT_OURS = ["TORCHINDUCTOR_CACHE_DIR"]


def test_importing_every_module_leaves_environment_logging_threads_and_seeds_alone(probed: dict[str, object]) -> None:
    assert probed["environment"] in ([], NOT_OURS)
    assert (probed["handlers"], probed["threads"]) == ([], 0)
    assert probed["random"] is False
