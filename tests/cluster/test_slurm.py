"""cluster/slurm.sh: with a stand-in `srun` and a real Ray, and, where Slurm is installed, with a real Slurm.

The stand-in runs every task of a step as a process of this machine, so that two raylets stand for two nodes. What the
launcher does with SIGTERM is tested in tests/launch; here it is sent through the script, and only Slurm's test trains.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from samtrain.engine.checkpoint_folder import complete_checkpoints

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "slurm.sh"

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do
    SLURM_PROCID=$task "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
wait || true
wait "${tasks[@]}"
"""

# In the place of `python -m samtrain.launch`: sees the cluster, "saves" when told to stop.
LAUNCHER = """
import pathlib, signal, sys
import ray

def save(number, frame):
    pathlib.Path("saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
ray.init(address=sys.argv[sys.argv.index("--address") + 1], log_to_driver=False)
signal.signal(signal.SIGTERM, save)
print("training on", sum(node["Alive"] for node in ray.nodes()), "nodes", *sys.argv[1:], flush=True)
while True:
    signal.pause()
"""
PYTHON = """#!/usr/bin/env bash
[[ $* == *--print-config* ]] && exit
[[ ${1-} != -m ]] || { shift 2 && set -- "$LAUNCHER" "$@"; }
exec "$REAL_PYTHON" "$@"
"""


def environment(*first_on_path: Path, **variables: str) -> dict[str, str]:
    """Of a user who submits a job: the environment of samtrain is active, no other cluster is known."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RAY_", "MLFLOW_"))}
    path = os.pathsep.join([*map(str, first_on_path), str(Path(sys.executable).parent), kept["PATH"]])
    packages = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return kept | {"PATH": path, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts slurm.sh as slurmd would on the first node of an allocation of 1-CPU nodes."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, nodes: int = 1, srun: str = SRUN, **stand_ins: str) -> subprocess.Popen[str]:
        (tmp_path / "bin").mkdir()
        for name, text in {"srun": srun, **stand_ins}.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        variables = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_CPUS_PER_TASK": "1"}
        variables |= {"LAUNCHER": str(tmp_path / "launcher.py"), "REAL_PYTHON": sys.executable}
        variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
        process = subprocess.Popen(
            [SCRIPT, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, start_new_session=True,
            env=environment(tmp_path / "bin", **variables),
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    out = ""
    for line in process.stdout:
        out += line
        if re.search(pattern, line):
            return out
    raise AssertionError(f"{pattern} never came, status {process.wait()}:\n{out}")


def test_a_recipe_that_cannot_be_read_ends_with_2_before_ray_starts(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("nmae: x\n")
    job = start("bad.yaml", srun="#!/bin/sh\necho srun was called\n")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 2, out
    assert "did you mean `name`" in out and "srun was called" not in out


def test_a_ray_that_does_not_start_ends_the_job(start: Start, tiny_recipe: Path) -> None:
    job = start(tiny_recipe, srun="#!/bin/sh\necho no such node\nexit 1\n")
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 1, out
    assert "no such node" in out and "Ray did not start" in out


def test_the_status_is_the_launchers_own(start: Start, tiny_recipe: Path) -> None:
    job = start(tiny_recipe, "--dry-run", nodes=1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0, out
    assert "largest sample" in out


def test_sigterm_to_the_script_alone_reaches_the_launcher_whose_status_it_waits_for(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    job = start("recipe.yaml", "train.seed=1", nodes=2, python=PYTHON)
    out = read_until(job, "^training on ")
    job.send_signal(signal.SIGTERM)
    rest, _ = job.communicate(timeout=60)
    assert job.returncode == 143, out + rest
    assert (tmp_path / "saved").exists(), out + rest
    assert "training on 2 nodes --address " in out and "recipe.yaml train.seed=1" in out, out


# ---- a real Slurm

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={pid}
# Everything here is one user's own, on loopback.
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def neighbouring_ports(number: int) -> list[int]:
    """Slurm wants the ports of a range of nodes as a range; below those that the system gives to connections."""
    for first in range(17000 + os.getpid() % 10000, 32000, number):
        ports = list(range(first, first + number))
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return ports
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """A Slurm of two nodes on this machine, without root's services; yields the environment of its users."""
    daemons = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "slurmd")}
    if not all(daemons.values()) or not shutil.which("sbatch"):
        pytest.skip("Slurm is not installed (Debian: slurmctld slurmd slurm-client)")
    import getpass

    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, host = Path(name), socket.gethostname().split(".")[0]
        (folder / "state").mkdir()
        values = {"host": host, "folder": folder, "user": getpass.getuser(), "cpus": os.cpu_count(), "pid": os.getpid()}
        (folder / "slurm.conf").write_text(SLURM_CONF.format(ports=neighbouring_ports(3), **values))
        variables = environment(SLURM_CONF=str(folder / "slurm.conf"))
        commands = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]]
        try:
            with open(folder / "log", "wb") as log:
                for command in commands:
                    command[0] = str(daemons[command[0]])
                    processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
            end = time.monotonic() + 60
            while "2 idle" not in (states := sinfo(variables)):
                if time.monotonic() > end or any(process.poll() is not None for process in processes):
                    pytest.skip(f"Slurm does not start here: {states}\n{(folder / 'log').read_text()[-3000:]}")
                time.sleep(0.5)
            yield variables
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(timeout=60)
            for job in range(os.getpid(), os.getpid() + 2):
                shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def sinfo(variables: dict[str, str]) -> str:
    asked = subprocess.run(["sinfo", "-h", "-o", "%D %t"], env=variables, capture_output=True, text=True, check=False)
    return asked.stdout + asked.stderr


@pytest.fixture
def sbatch(slurm: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def submit(*arguments: str | Path) -> subprocess.Popen[str]:
        # What the script asks for and these nodes have not.
        options = ["--wait", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path / 'log'}"]
        command = ["sbatch", *options, "--nodes=2", SCRIPT, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=slurm, cwd=tmp_path, text=True, **pipes)

    return submit


@pytest.mark.slow
def test_slurm_stops_a_run_which_saves_and_the_same_command_goes_on(
    sbatch: Callable[..., subprocess.Popen[str]], slurm: dict[str, str], tiny_recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    first = sbatch(tiny_recipe, "train.max_steps=60", "train.logging_steps=1")
    assert first.stdout is not None
    job = first.stdout.readline().strip()
    end = time.monotonic() + 200
    while not (log.exists() and re.search(r"^step \d+/60 ", log.read_text(), re.MULTILINE)):
        assert first.poll() is None and time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], env=slurm, check=True)  # as --signal=B:TERM does
    assert first.wait(timeout=120) == 143, log.read_text()
    assert len(complete_checkpoints(tmp_path / "run")) == 1, log.read_text()

    second = sbatch(tiny_recipe, "train.max_steps=60")
    assert second.wait(timeout=200) == 0, log.read_text()
    plans = log.read_text()
    assert plans.count("new run") == 1 and plans.count("resumes") == 1, plans
    assert (tmp_path / "run" / "finished.json").exists()
