"""Strict options: an unknown key or a wrong type is an error that says where, and the nearest name."""

import difflib
import typing
from typing import Any, TypeVar

import pydantic

from samtrain.core.errors import ConfigError

T = TypeVar("T", bound="Options")


class Options(pydantic.BaseModel):
    """Base of every options class: frozen, no unknown keys, no silent conversions ("8" is not 8)."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def parse_options(cls: type[T], values: dict[str, Any], *, source: str) -> T:
    """Validate `values` as `cls`.

    Args:
        values: nested plain dictionaries, as read from YAML.
        source: the file the values came from, named in every message.

    Raises:
        ConfigError: one line per mistake: file, dotted key, given value, what is expected.
    """
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_describe(cls, item) for item in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def _describe(cls: type[Options], item: Any) -> str:
    location = [part for part in item["loc"]]
    dotted = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}"
        return f"unknown key `{dotted}`; {hint}"
    if item["type"] == "missing":
        return f"`{dotted}` is required and missing"
    message = item["msg"].removeprefix("Value error, ")
    if not location or (item["type"] == "value_error" and isinstance(item["input"], dict)):
        return message  # of a section as a whole; it names the keys
    return f"`{dotted}` = {item['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(cls: type[Options], path: list[Any]) -> list[str]:
    """Names of the fields of the options class that `path` leads to."""
    current: Any = cls
    for part in path:
        if isinstance(part, int):  # an element of a list
            continue
        if not (isinstance(current, type) and issubclass(current, Options)):
            return []
        field = current.model_fields.get(str(part))
        current = None if field is None else _options_class(field.annotation)
    return sorted(current.model_fields) if isinstance(current, type) and issubclass(current, Options) else []


def _options_class(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return annotation
    for argument in typing.get_args(annotation):
        found = _options_class(argument)
        if found is not None:
            return found
    return None
