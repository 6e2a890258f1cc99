"""The formats by name, and what a file looks like."""

import difflib
from pathlib import Path

from samtrain.core.errors import ConfigError, DataError
from samtrain.data.convert import aesop, annotations, demon, llava, messages, nico, ssid, vist
from samtrain.data.convert.base import Format, Source
from samtrain.data.convert.json_stream import head_of
from samtrain.data.convert.options import ConvertOptions

FORMATS: dict[str, Format] = {
    "annotations": annotations.FORMAT,
    "demon": demon.FORMAT,
    "vist": vist.FORMAT,
    "aesop": aesop.FORMAT,
    "ssid": ssid.FORMAT,
    "nico": nico.FORMAT,
    "messages": messages.FORMAT,
    "llava": llava.FORMAT,
}
SHARDS = "shards"
_OF_SOME_FORMATS = ("instructions", "group_size", "layout")
_OF_FORMATS = ("images", "split", "task", *_OF_SOME_FORMATS)


def check_options(options: ConvertOptions) -> None:
    """Refuse options that would be ignored.

    Raises:
        ConfigError: shards are on both sides or on none, or an option means nothing here.
    """
    if (options.format == SHARDS) == (options.to == SHARDS):
        raise ConfigError(f"{options.format} to {options.to}: one of the two is `{SHARDS}`; --to says what OUT becomes")
    uses = frozenset() if options.format == SHARDS else format_of(options).uses
    for name in _OF_FORMATS if options.format == SHARDS else _OF_SOME_FORMATS:
        if name not in uses and getattr(options, name) != ConvertOptions.model_fields[name].default:
            raise ConfigError(f"--{name.replace('_', '-')} means nothing to the format {options.format}")


def format_of(options: ConvertOptions) -> Format:
    """The format.

    Raises:
        ConfigError: no such format.
    """
    if options.format not in FORMATS:
        near = difflib.get_close_matches(options.format, [*FORMATS, SHARDS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*FORMATS, SHARDS])}"
        raise ConfigError(f"format {options.format!r} is not known; {hint}")
    return FORMATS[options.format]


def sources_of(chosen: Format, options: ConvertOptions) -> list[Source]:
    """The files of each split, which look as the format says.

    Raises:
        DataError: there are none, or they look like another format.
    """
    path = Path(options.source)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    found = chosen.sources(path, options)
    if not found:
        raise DataError(
            f"{path}: holds nothing of the format {options.format} ({chosen.looks_like}){_looks_like(path)}"
        )
    for source in found:
        if not chosen.fits(head_of(source.path)):
            raise DataError(f"{source.path}: is not {chosen.looks_like}{_looks_like(source.path)}")
    if options.split and len(found) > 1:
        raise ConfigError(
            f"--split {options.split}: {path} has splits of its own: {', '.join(one.split for one in found)}"
        )
    prepared = [chosen.prepare(source, options) for source in found]
    splits = [source.split for source in prepared]
    if len(set(splits)) < len(splits):
        raise DataError(f"{path}: two of its files are of one split ({', '.join(splits)}); convert them one by one")
    return prepared


def _looks_like(path: Path) -> str:
    """The end of an error message: which format, if any, this is."""
    options = ConvertOptions(format="", source=str(path), output="")
    for name, other in FORMATS.items():
        try:
            found = other.sources(path, options)
            if found and all(other.fits(head_of(source.path)) for source in found):
                return f"; this looks like `{name}`: {other.looks_like}"
        except DataError:
            continue
    if path.is_dir() and (any(path.glob("*.tar")) or any(path.glob("*/*.tar"))):
        return f"; this looks like `{SHARDS}`"
    return "; it looks like none of the known formats"
