"""Libraries of the extra `mmlink`, and models by name: one clear error where something is not there."""

import importlib
from pathlib import Path
from typing import Any

from samtrain.core.errors import ConfigError


def import_optional(module: str, *, needed_for: str, install: str = "pip install 'samtrain[mmlink]'") -> Any:
    """Raises ConfigError where the library is not installed, or is broken."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{needed_for} needs {module}, which cannot be imported ({error}); `{install}`") from None


def import_cv2() -> Any:
    """OpenCV with one thread, so that workers do not fight for cores and results do not depend on their number."""
    cv2 = import_optional("cv2", needed_for="building MmLINK")
    cv2.setNumThreads(1)
    return cv2


def pretrained(loader: Any, model: str, *, where: str, revision: str | None = None, **options: Any) -> Any:
    """`loader.from_pretrained` of a hub name or local folder; code of the repository is never run.

    Raises:
        ConfigError: there is no such model, or it is not of that kind.
    """
    local = Path(model).expanduser()
    try:
        return loader.from_pretrained(
            str(local) if local.is_dir() else model, revision=revision, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().split("\n")[0][:300]
        raise ConfigError(
            f"{where} = {model!r}: cannot be loaded: {first}; give a hub name or a local folder"
        ) from None


def choose_device(name: str) -> str:
    """ "auto": the GPU this worker was given, else the CPU."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
