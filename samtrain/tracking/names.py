"""Names as MLflow takes them: letters, digits and `_ - . / :` only, at most 250 characters, a path in normal form."""

import posixpath
import re
from collections.abc import Mapping
from typing import Any

from samtrain.core.errors import ConfigError

_MAX_LENGTH = 250
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_\-./:]")


def safe_name(name: str) -> str:
    """The nearest allowed name: other characters become `_`, empty and `..` parts of the path disappear."""
    parts = [part for part in _NOT_ALLOWED.sub("_", name).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:_MAX_LENGTH].rstrip("/") or "_"


def safe_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under allowed names; where two become the same one, the later gets a number, so none hides another."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = unique = safe_name(key)
        number = 2
        while unique in result:
            unique, number = f"{name[: _MAX_LENGTH - 4]}_{number}", number + 1
        result[unique] = value
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names with text values, e.g. {"train": {"seed": 1}} -> {"train.seed": "1"}."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(value)
    return flat


def safe_artifact_file(path: str) -> str:
    """A relative path inside the run's artifacts, in normal form.

    Raises:
        ConfigError: the path leaves the run's folder or names none.
    """
    normal = posixpath.normpath(path)
    if not path or normal in (".", "..") or normal.startswith(("/", "../")) or "\\" in path:
        raise ConfigError(
            f"artifact path {path!r}: give a relative path that stays inside the run, such as plots/loss.png"
        )
    return normal
