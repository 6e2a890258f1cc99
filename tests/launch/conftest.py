"""Stand-ins for `samtrain.train.run_worker`, in a module that other processes can import, and a recipe for them."""

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from samtrain.launch.stop_request import StopRequest
from samtrain.recipe import Recipe

STAND_INS = '''
"""Workers that do nothing but what launching must get right."""
import os, signal, sys, time

from samtrain.core.errors import ConfigError, Terminated
from samtrain.core.stopping import stop_requested

RANK = "RANK"


def succeed(recipe_yaml, *, emit):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ[name] for name in names}
    for step in (1, 2, 3):
        emit({"kind": "step", "step": step, "max_steps": 3, "metrics": {"train/loss": 1.0 / step}, "eta_seconds": 0.0})
    return {"status": "finished", "summary_rows": [["environment", str(values)]], "environment": values}


def all_reduce(recipe_yaml, *, emit):
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    emit({"kind": "message", "level": "info", "text": f"sum {total.item()}"})
    return {"status": "finished", "summary_rows": [["sum", total.item()]]}


def second_rank_fails_first(recipe_yaml, *, emit):
    if os.environ[RANK] == "1":
        raise ValueError("the true cause")
    time.sleep(1.0)
    raise ConnectionError("lost connection to rank 1")


def bad_input(recipe_yaml, *, emit):
    raise ConfigError("data.path: nothing is there")


def second_rank_is_killed(recipe_yaml, *, emit):
    if os.environ[RANK] == "1":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.5)
    raise ConnectionError("lost connection to rank 1")


def second_rank_hangs(recipe_yaml, *, emit):
    if os.environ[RANK] == "1":
        time.sleep(600)
    raise ValueError("rank 0 fails, rank 1 hangs")


def deaf(recipe_yaml, *, emit):
    emit({"kind": "message", "level": "info", "text": "training"})
    time.sleep(60)


def fail_once(recipe_yaml, *, emit):
    import yaml

    recipe = yaml.safe_load(recipe_yaml)
    folder = recipe["output_dir"]
    marker = os.path.join(folder, "checkpoint-1", "COMPLETE")
    if os.path.exists(marker):
        resume = recipe["train"]["resume_from_checkpoint"]
        return {"status": "finished", "summary_rows": [["resume", str(resume)]]}
    time.sleep(1.0)  # the other rank is past its check
    if os.environ[RANK] == "0":
        os.makedirs(os.path.dirname(marker))
        open(marker, "w").close()
    raise OSError("a lost disk")


def train_until_stopped(recipe_yaml, *, emit):
    emit({"kind": "message", "level": "info", "text": "training"})
    end = time.time() + 60
    while time.time() < end:
        if stop_requested():
            raise Terminated("SIGTERM: saved checkpoint-7")
        time.sleep(0.05)
    raise AssertionError("nobody stopped this worker")
'''


@pytest.fixture(scope="session")
def stand_ins_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_ins")
    (folder / "samtrain_stand_ins.py").write_text(STAND_INS)
    return folder


@pytest.fixture
def stand_ins(stand_ins_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of stand-ins; spawned workers find it too (sys.path travels with them)."""
    monkeypatch.syspath_prepend(str(stand_ins_folder))
    monkeypatch.setenv("PYTHONPATH", str(stand_ins_folder), prepend=os.pathsep)
    import samtrain_stand_ins

    return samtrain_stand_ins


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of two CPU workers; the stand-ins never read its data."""

    def make(**launch: object) -> Recipe:
        values = {
            "name": "stand-in",
            "output_dir": str(tmp_path / "run"),
            "launch": {"num_workers": 2, "device": "cpu", **launch},
            "data": {"path": str(tmp_path / "data")},
        }
        return Recipe.model_validate(values)

    return make


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    with StopRequest() as request:
        yield request


@pytest.fixture
def write_script(tmp_path: Path) -> Callable[[str], Path]:
    """A Python file to start as a process of its own."""

    def write(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return path

    return write
