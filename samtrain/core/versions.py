"""What ran: versions of the packages that decide the numbers, and the commit of the code."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "triton",
    "flash-attn",
    "liger-kernel",
    "peft",
    "webdataset",
    "ray",
    "mlflow",
    "timm",
)


def versions() -> dict[str, str]:
    """Package name -> version ("absent" where it is not installed), with Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_commit() -> str:
    """Commit of the checkout the code runs from, with `-dirty` where it has changes.

    Outside a checkout (a copy on another machine) what SAMTRAIN_COMMIT says, else "unknown".
    """
    root = Path(__file__).resolve().parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SAMTRAIN_COMMIT", "unknown")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
