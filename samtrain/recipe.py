"""The recipe: one strict tree of options for a run, from YAML, a base recipe and key=value overrides.

Precedence: defaults <- `base:` recipe (looked up beside the file, recursively) <- the file <- overrides.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from samtrain.core.errors import ConfigError
from samtrain.core.options import Options, parse_options
from samtrain.data.options import DataOptions
from samtrain.engine.options import TrainOptions
from samtrain.evaluation.options import EvaluationOptions
from samtrain.generation.options import GenerationOptions
from samtrain.launch.options import LaunchOptions
from samtrain.model.options import ModelOptions
from samtrain.tracking.options import TrackingOptions


class Recipe(Options):
    """Everything that decides a run; the resolved recipe is saved with it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""  # for people: what it trains, the GPUs and the time it needs
    output_dir: str
    seed: int = 42
    launch: LaunchOptions = LaunchOptions()
    model: ModelOptions = ModelOptions()
    data: DataOptions
    train: TrainOptions = TrainOptions()
    generation: GenerationOptions = GenerationOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    tracking: TrackingOptions = TrackingOptions()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        world, batch = self.launch.num_workers, self.train.global_batch_size
        if batch % world:
            raise ValueError(
                f"train.global_batch_size ({batch}) is not divisible by launch.num_workers ({world}); "
                f"use a batch of {batch - batch % world or world} or {batch + world - batch % world}, or other workers"
            )
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run: `train.max_steps`, or `train.num_train_epochs` in steps, rounded up."""
        return self.train.max_steps or math.ceil(self.train.num_train_epochs * steps_per_epoch)

    def to_yaml(self) -> str:
        """The resolved recipe; reading it again gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge and validate a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value` with YAML values, e.g. `train.learning_rate=1e-4`.

    Raises:
        ConfigError: naming file, key and value.
    """
    values = _read(Path(path), seen=())
    for override in overrides or []:
        _apply_override(values, override)
    return parse_options(Recipe, values, source=str(path))


def parse_recipe(text: str, *, source: str) -> Recipe:
    """The recipe in a resolved YAML text (`Recipe.to_yaml`)."""
    return parse_options(Recipe, _parse_yaml(text, source=source), source=source)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; people mean a number. And a key given twice is an error, not the last one's win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` recipes include each other: {' -> '.join(map(str, seen))}")
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}") from None
    values = _parse_yaml(text, source=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(_read(path.parent / str(base), seen=(*seen, path.resolve())), values)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write key=value, e.g. train.max_steps=100")
    *parents, last = key.split(".")
    current = values
    for parent in parents:
        child = current.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: `{parent}` is a value, not a section")
        current = child
    current[last] = _parse_yaml(text, source=f"override {override!r}")
