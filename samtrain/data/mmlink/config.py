"""Read a configuration file: YAML, then `key=value` overrides, then `parse_config`."""

import re
from pathlib import Path
from typing import Any

import yaml

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.options import BuildConfig, parse_config


def load_config(path: str | Path, overrides: list[str] | None = None) -> BuildConfig:
    """Read, override and check a configuration.

    Args:
        overrides: `dotted.key=value` with YAML values; items of lists by number (`sources.0.path=photos`).

    Raises:
        ConfigError: naming file, key and value.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    values = _parse(text, source=str(path))
    for override in overrides or []:
        _apply(values, override)
    return parse_config(values, source=str(path))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people mean a number. A key given twice is an error, not the last one's win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, *, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _apply(values: Any, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write key=value, e.g. num_samples=200")
    *parents, last = key.split(".")
    current = values
    for parent in parents:
        current = _child(current, parent, override)
    value = _parse(text, source=f"override {override!r}")
    if isinstance(current, list):
        current[_number(current, last, override)] = value
    elif isinstance(current, dict):
        current[last] = value
    else:
        raise ConfigError(f"override {override!r}: `{'.'.join(parents)}` is a value, not a section")


def _child(current: Any, name: str, override: str) -> Any:
    if isinstance(current, list):
        return current[_number(current, name, override)]
    if not isinstance(current, dict):
        raise ConfigError(f"override {override!r}: `{name}` lies in a value, not in a section")
    return current.setdefault(name, {})


def _number(items: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise ConfigError(f"override {override!r}: `{text}` is not the number of one of {len(items)} items (from 0)")
    return int(text)
