"""Read a configuration file: YAML, then `key=value` overrides, then `parse_config`."""

from pathlib import Path

from samtrain.core.errors import ConfigError
from samtrain.core.strict_yaml import apply_override, parse_yaml
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
    values = parse_yaml(text, source=str(path))
    if isinstance(values, dict):
        for override in overrides or []:
            apply_override(values, override, example="num_samples=200")
    return parse_config(values, source=str(path))
