"""`launch.device: auto`, decided: GPUs where every worker gets one of its own."""

from typing import Literal

from samtrain.core.errors import ConfigError
from samtrain.core.events import Emit, message
from samtrain.recipe import Recipe


def local_gpus() -> int:
    """GPUs of this machine that PyTorch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_type(recipe: Recipe, *, num_gpus: int) -> Literal["cpu", "cuda"]:
    """What the workers run on where there are so many GPUs."""
    return "cuda" if recipe.launch.device != "cpu" and num_gpus >= recipe.launch.num_workers else "cpu"


def with_device(recipe: Recipe, *, num_gpus: int, where: str, emit: Emit) -> Recipe:
    """The recipe with `launch.device` cpu or cuda.

    Raises:
        ConfigError: `cuda`, and there are fewer GPUs than workers.
    """
    asked, workers = recipe.launch.device, recipe.launch.num_workers
    if asked == "cuda" and num_gpus < workers:
        raise ConfigError(
            f"launch.device is cuda: {workers} workers need a GPU each, {where} has {num_gpus}; "
            f"change launch.num_workers, or use launch.device=cpu"
        )
    if asked == "auto" and 0 < num_gpus < workers:
        text = f"{where} has {num_gpus} GPUs for {workers} workers: training on CPUs"
        emit(message(f"{text}; launch.num_workers={num_gpus} would use the GPUs", level="warning"))
    device = device_type(recipe, num_gpus=num_gpus)
    return recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"device": device})})
