"""cluster/mlflow-server.yaml: its server's command and variables for real, with moto as the S3 store.

What stands for the other two services: moto, and SQLite or, where it is installed, a Postgres of the test's own.
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
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from samtrain.tracking.mlflow_tracker import MlflowTracker
from samtrain.tracking.options import TrackingOptions

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"POSTGRES_PASSWORD": "p0stgres", "S3_ACCESS_KEY": "key", "S3_SECRET_KEY": "secret"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services, with what Compose puts in the place of ${NAME}, ${NAME:-default} and ${NAME:?message}."""

    def value(match: re.Match[str]) -> str:
        name, operator, word = match[1], match[2], match[3]
        return SECRETS[name] if operator == ":?" else word

    text = (ROOT / "cluster" / "mlflow-server.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+)(:[-?])?([^}]*)\}", value, text))["services"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


def answers(url: str, **headers: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    keys = {"aws_access_key_id": SECRETS["S3_ACCESS_KEY"], "aws_secret_access_key": SECRETS["S3_SECRET_KEY"]}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket="mlflow")
    yield url
    server.stop()


@pytest.fixture
def postgres(services: dict[str, Any]) -> Iterator[int]:
    """A Postgres with the file's user and password; yields its port."""
    pytest.importorskip("psycopg", reason="pip: psycopg[binary]")
    binaries = {name: shutil.which(name) for name in ("initdb", "postgres")}
    if not all(binaries.values()):
        pytest.skip("Postgres is not installed (Debian: postgresql)")
    # It refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    settings = services["postgres"]["environment"]
    with tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, port, password = Path(name), free_port(), Path(name) / "password"
        password.write_text(settings["POSTGRES_PASSWORD"])
        for path in (folder, password):
            shutil.chown(path, user or os.geteuid())
        create = [binaries["initdb"], "-D", folder / "data", "-A", "scram-sha-256", "-U", settings["POSTGRES_USER"]]
        done = subprocess.run(
            [*map(str, create), f"--pwfile={password}", "--no-sync"],
            capture_output=True, text=True, user=user, cwd=folder, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"initdb fails here: {done.stderr}")
        # The image makes a database of the user's name; here it is made by the server's own single-user mode.
        serve = [str(binaries["postgres"]), "-D", str(folder / "data"), "-F", "-k", str(folder), "-h", "127.0.0.1"]
        single = [serve[0], "--single", "-D", str(folder / "data"), "postgres"]
        subprocess.run(single, input="CREATE DATABASE mlflow\n", text=True, user=user, check=True, capture_output=True)
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen([*serve, "-p", str(port)], stdout=log, stderr=log, user=user, cwd=folder)
        try:
            wait_for(lambda: "ready to accept" in (folder / "log").read_text(), process, folder / "log")
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_a_tracker_logs_to_the_servers_own_command(
    services: dict[str, Any], s3: str, store: str, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server, port = services["mlflow"], free_port()
    environment = dict(server["environment"])
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://mlflow:p0stgres@postgres:5432/mlflow"
    if store == "postgres":
        here = f"127.0.0.1:{request.getfixturevalue('postgres')}"
        environment["MLFLOW_BACKEND_STORE_URI"] = environment["MLFLOW_BACKEND_STORE_URI"].replace("postgres:5432", here)
    else:
        environment["MLFLOW_BACKEND_STORE_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    environment["MLFLOW_S3_ENDPOINT_URL"] = s3
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
        monkeypatch.delenv(name)
    # Loopback, a free port, and one worker less in the place of the container's.
    replaced = {"0.0.0.0": "127.0.0.1", "5000": str(port), "2": "1"}
    command = [sys.executable, "-m", *(replaced.get(word, word) for word in server["command"])]
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | environment, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{uri}/health"), process, log)
        tracker = MlflowTracker(
            TrackingOptions(tracking_uri=uri, system_metrics=False),
            run_name="a run", spool_folder=tmp_path / "spool", default_store=tmp_path / "runs",
        )  # fmt: skip
        tracker.log_metrics({"train/loss": 0.5}, step=1)
        (tmp_path / "ledger.jsonl").write_text("{}\n")
        tracker.log_artifact(tmp_path / "ledger.jsonl")
        tracker.finish("FINISHED")

        from mlflow import MlflowClient

        client = MlflowClient(uri)
        run = client.get_run(str(tracker.run_id))
        assert run.data.metrics == {"train/loss": 0.5} and run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")  # through the server: no keys on the nodes
        assert Path(client.download_artifacts(run.info.run_id, "ledger.jsonl")).read_text() == "{}\n"
        assert not answers(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", Host="elsewhere.example")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_server_is_published_on_loopback_and_the_file_holds_no_secret(services: dict[str, Any]) -> None:
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert not any("ports" in service for name, service in services.items() if name != "mlflow")
    text = (ROOT / "cluster" / "mlflow-server.yaml").read_text()
    for line in text.splitlines():
        if re.search(r"(PASSWORD|SECRET\w*|ACCESS_KEY\w*):", line):
            assert re.search(r"\$\{\w+:\?", line), line
