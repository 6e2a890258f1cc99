"""The recipe: one strict tree of options for a run, from YAML, a base recipe and key=value overrides.

Precedence: defaults <- `base:` recipe (looked up beside the file, recursively) <- the file <- overrides.
"""

import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from samtrain.core.errors import ConfigError
from samtrain.core.options import Options, parse_options
from samtrain.core.strict_yaml import apply_override, parse_yaml
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
        held_out = self.evaluation.splits
        if held_out and not self.data.path:
            raise ValueError(f"evaluation.splits is {held_out} and data.path, where they are, is missing; set it")
        guidance = self.model.guidance
        if self.evaluation.context_gain and (guidance.mode == "none" or guidance.context == "own"):
            setting = "mode: none" if guidance.mode == "none" else "context: own"
            raise ValueError(
                f"evaluation.context_gain is true, but with model.guidance.{setting} there is no context to leave out "
                f"or to shuffle; set it to false"
            )
        if self.data.mixture and self.data.path and not (held_out or self.data.validation_split or self.data.build):
            raise ValueError(
                f"data.path ({self.data.path}) is not trained on beside data.mixture, and nothing is held out: list it "
                f"in the mixture, or leave it out"
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
        apply_override(values, override, example="train.max_steps=100")
    return parse_options(Recipe, values, source=str(path))


def parse_recipe(text: str, *, source: str) -> Recipe:
    """The recipe in a resolved YAML text (`Recipe.to_yaml`)."""
    return parse_options(Recipe, parse_yaml(text, source=source), source=source)


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` recipes include each other: {' -> '.join(map(str, seen))}")
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}") from None
    values = parse_yaml(text, source=str(path))
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
