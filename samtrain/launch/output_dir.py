"""The output folder: which run it holds, and what launching a recipe again does.

Marker files:
    recipe.yaml                 the resolved recipe, written by the launcher before any worker starts
    checkpoint-<step>/COMPLETE  written last into a checkpoint; without it the checkpoint does not exist
    finished.json               written by train.py when the run has reached its end

Rules, for a folder that holds
    nothing                     a new run starts (a recipe.yaml without a checkpoint is a failed start: nothing)
    the same run, unfinished    it resumes (`auto`); under `resume_from_checkpoint: null` it is refused
    the same run, finished      it stays as it is: a new run starts in the next folder, `<output_dir>-2`, `-3`, ...
    another run                 refused; the keys that differ are named
A checkpoint folder given as `resume_from_checkpoint` that lies in the output folder is a wish to go on from there,
also with another recipe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from samtrain.core.errors import ConfigError
from samtrain.core.files import atomic_write
from samtrain.engine.checkpoint_folder import FINISHED_FILE, complete_checkpoints, find_resume
from samtrain.recipe import Recipe

RECIPE_FILE = "recipe.yaml"

# What may change between a run and its continuation: it does not decide the numbers.
_FREE_KEYS = (
    "name",
    "description",
    "output_dir",
    "launch",
    "tracking",
    "data.build",
    "data.num_workers",
    "data.prefetch_steps",
    "data.max_bad_fraction",
    "data.verify_hashes",
    "data.remote",
    "data.retry_quarantined",
    "train.zero",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.resume_from_checkpoint",
    "train.timeout_seconds",
    "train.max_loss_spike",
    "evaluation",
    "generation",
)


@dataclass(frozen=True)
class OutputDir:
    """Where a run goes. recipe: with its final output_dir. explanation: for the plan, in words."""

    recipe: Recipe
    action: Literal["new", "resume"]
    explanation: str

    @property
    def path(self) -> Path:
        return Path(self.recipe.output_dir)


def resolve_output_dir(recipe: Recipe) -> OutputDir:
    """Decide where the run of a recipe goes; nothing is written.

    Raises:
        ConfigError: the folder holds another run, or an unfinished one that must not be resumed.
    """
    base = Path(recipe.output_dir)
    if base.exists() and not base.is_dir():
        raise ConfigError(f"output_dir: {base} is a file, not a folder; choose another output_dir")
    given = _given_checkpoint(recipe)
    finished: list[Path] = []
    for folder in _candidates(base):
        if not _holds_a_run(folder):
            return _new(recipe, folder, finished)
        differing = differing_keys(_read_recipe(folder), recipe)
        if differing and folder == base and not (given and given.parent.resolve() == base.resolve()):
            raise ConfigError(_other_run(folder, differing))
        if differing and folder != base:
            continue
        if (folder / FINISHED_FILE).exists():
            finished.append(folder)
            continue
        if recipe.train.resume_from_checkpoint is None:
            raise ConfigError(
                f"output_dir: {folder} holds this run, unfinished, and train.resume_from_checkpoint is null; "
                f"set it to `auto` to go on, or choose another output_dir"
            )
        return _resume(recipe, folder)
    raise AssertionError("unreachable: candidates never end")


def claim(output: OutputDir) -> None:
    """Write the resolved recipe into the folder."""
    output.path.mkdir(parents=True, exist_ok=True)
    atomic_write(output.path / RECIPE_FILE, output.recipe.to_yaml())


def restart_recipe(recipe: Recipe) -> Recipe:
    """The recipe for a restart after a failure: from the newest checkpoint of this run, where it has one."""
    if not complete_checkpoints(Path(recipe.output_dir)):
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"resume_from_checkpoint": "auto"})})


def differing_keys(saved: dict[str, Any], recipe: Recipe) -> list[str]:
    """`key: saved value -> new value` for every key that decides the numbers."""
    before, after = _flatten(saved), _flatten(recipe.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if not _is_free(key)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def _candidates(base: Path) -> Iterator[Path]:
    yield base
    number = 2
    while True:
        yield base.with_name(f"{base.name}-{number}")
        number += 1


def _holds_a_run(folder: Path) -> bool:
    return (folder / FINISHED_FILE).exists() or bool(complete_checkpoints(folder))


def _read_recipe(folder: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((folder / RECIPE_FILE).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"output_dir: {folder} holds checkpoints but its {RECIPE_FILE} cannot be read ({error}); "
            f"choose another output_dir"
        ) from None
    return values if isinstance(values, dict) else {}


def _given_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint folder that the recipe names, if it names one; checked."""
    value = recipe.train.resume_from_checkpoint
    return None if value in (None, "auto") else find_resume(recipe.output_dir, value)


def _new(recipe: Recipe, folder: Path, finished: list[Path]) -> OutputDir:
    given = _given_checkpoint(recipe)
    explanation = f"new run from {given}" if given else "new run"
    if finished:
        explanation += f"; {finished[-1]} is finished and stays as it is"
    return OutputDir(recipe.model_copy(update={"output_dir": str(folder)}), "new", explanation)


def _resume(recipe: Recipe, folder: Path) -> OutputDir:
    source = find_resume(folder, recipe.train.resume_from_checkpoint)
    return OutputDir(recipe.model_copy(update={"output_dir": str(folder)}), "resume", f"resumes from {source}")


def _other_run(folder: Path, differing: list[str]) -> str:
    shown = "\n".join(f"  {line}" for line in differing[:12])
    more = f"\n  and {len(differing) - 12} more" if len(differing) > 12 else ""
    return (
        f"output_dir: {folder} holds another run; these keys differ (there -> here):\n{shown}{more}\n"
        f"choose another output_dir, or move {folder} away"
    )


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
