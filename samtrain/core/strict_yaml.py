"""YAML as people mean it, and `dotted.key=value` overrides; mistakes are errors that name the place."""

import re
from typing import Any

import yaml

from samtrain.core.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people mean a number. And a key given twice is an error, not the last one's win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []  # a key may be a list, which the parent refuses with its place
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, *, source: str) -> Any:
    """Plain values.

    Args:
        source: where the text comes from; named in the message.

    Raises:
        ConfigError: it is no YAML, or a key is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def apply_override(values: dict[str, Any], override: str, *, example: str) -> None:
    """Set one value in place. Items of lists go by number, from 0: `sources.0.path=photos`.

    Args:
        override: `dotted.key=value`, the value as YAML.
        example: of an override that makes sense here, for the message.

    Raises:
        ConfigError: naming the override.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write key=value, e.g. {example}")
    *parents, last = key.split(".")
    current: Any = values
    for parent in parents:
        at: Any = _number(current, parent, override) if isinstance(current, list) else parent
        child = current[at] if isinstance(current, list) else current.setdefault(at, {})
        if not isinstance(child, dict | list):
            raise ConfigError(f"override {override!r}: `{parent}` is a value, not a section")
        current = child
    at = _number(current, last, override) if isinstance(current, list) else last
    current[at] = parse_yaml(text, source=f"override {override!r}")


def _number(items: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise ConfigError(f"override {override!r}: `{text}` is not the number of one of {len(items)} items (from 0)")
    return int(text)
