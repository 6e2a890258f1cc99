"""A real Ray head with token authentication, a job submitted to it, and what comes back.

The head is a process of the test's own, ended by SIGTERM to its pid (`ray stop` would end every Ray of the machine).
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from samtrain.core.errors import InputError
from samtrain.launch.ray_backend import run_on_ray
from samtrain.launch.stop_request import StopRequest
from samtrain.recipe import Recipe

pytest.importorskip("ray")
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Head:
    address: str
    dashboard: str
    environment: dict[str, str]

    def submit(self, *command: str) -> subprocess.Popen[str]:
        submit = [str(RAY), "job", "submit", "--address", self.dashboard, "--", *command]
        return subprocess.Popen(
            submit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
        )


DRIVER = """
import sys
import samtrain_stand_ins
from samtrain.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], worker=getattr(samtrain_stand_ins, sys.argv[1])))
"""


@pytest.fixture(scope="module")
def head(stand_ins_folder: Path) -> Iterator[Head]:
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(stand_ins_folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        start = [str(RAY), "start", "--head", "--block", "--port", str(port), "--node-ip-address", "127.0.0.1"]
        start += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--temp-dir", folder]
        start += ["--num-cpus", "2", "--object-store-memory", str(100 * 2**20), "--disable-usage-stats"]
        start += ["--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())]
        process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            found = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
            _wait_for_jobs(found, process)
            yield found
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _wait_for_jobs(head: Head, process: subprocess.Popen[bytes]) -> None:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError("the Ray head offers no job API")


@pytest.fixture
def driver(write_script: Callable[[str], Path], tiny_recipe: Path) -> Callable[[str], list[str]]:
    """The command of a job that runs the launcher with a stand-in as its worker."""
    script = write_script(DRIVER)
    return lambda stand_in: [sys.executable, str(script), stand_in, str(tiny_recipe)]


def test_a_submitted_job_restarts_after_a_failure_and_succeeds_and_its_log_is_followed(
    head: Head, driver: Callable[[str], list[str]]
) -> None:
    job = head.submit(*driver("fail_once"), "launch.max_failures=1", "train.resume_from_checkpoint=null")
    out, _ = job.communicate(timeout=150)
    assert job.returncode == 0, out
    for earlier, later in pairwise(
        ["largest sample", "a lost disk; restart 1 of 1", "tiny: finished", "resume", "auto"]
    ):
        assert 0 <= out.find(earlier) < out.rfind(later), out


def test_a_job_that_fails_shows_the_first_traceback_and_fails(head: Head, driver: Callable[[str], list[str]]) -> None:
    job = head.submit(*driver("second_rank_fails_first"))
    out, _ = job.communicate(timeout=150)
    assert job.returncode == 1, out
    assert "rank 1 failed first" in out and "ValueError: the true cause" in out and "lost connection" not in out
    assert "exit code 1" in out


def test_ray_job_stop_reaches_the_workers_which_save_first(head: Head, driver: Callable[[str], list[str]]) -> None:
    job = head.submit(*driver("train_until_stopped"))
    assert job.stdout is not None
    lines = []
    for line in job.stdout:
        lines.append(line)
        if line == "training\n":
            break
    name = next(word.strip("'") for line in lines for word in line.split() if "raysubmit_" in word)
    stop = [str(RAY), "job", "stop", name, "--address", head.dashboard]
    subprocess.run(stop, env=head.environment, check=True, capture_output=True)
    out, _ = job.communicate(timeout=60)
    assert "SIGTERM: saved checkpoint-7" in out


@pytest.mark.parametrize(
    ("override", "bundle"), [("launch.cpus_per_worker=3", "3 CPU"), ("launch.device=cuda", "1 CPU + 1 GPU")]
)
def test_a_cluster_that_does_not_get_room_is_an_input_error_that_names_both(
    head: Head, driver: Callable[[str], list[str]], override: str, bundle: str
) -> None:
    overrides = [override, "launch.placement_timeout_seconds=5.0"]
    done = subprocess.run(
        [*driver("succeed"), *overrides, "--address", head.address],
        env=head.environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"no room for 2 workers of {bundle} each" in done.stderr and "1 nodes (2 CPU)" in done.stderr
    assert "waiting for room" in done.stdout


def test_no_cluster_at_the_address_is_an_input_error(make_recipe: Callable[..., Recipe], stop: StopRequest) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=f"no Ray cluster at {address}"):
        run_on_ray(make_recipe(), address=address, emit=print, stop=stop)


def test_without_a_cluster_a_ray_of_its_own_is_started(
    stand_ins: ModuleType, make_recipe: Callable[..., Recipe], stop: StopRequest
) -> None:
    events: list[dict[str, Any]] = []
    summary = run_on_ray(make_recipe(), address=None, emit=events.append, stop=stop, worker=stand_ins.all_reduce)
    assert summary["summary_rows"] == [["sum", 3.0]]
    assert [event["text"] for event in events] == ["sum 3.0"]
