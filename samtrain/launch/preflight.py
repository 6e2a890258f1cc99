"""Everything that can be known before a weight is loaded, checked in the launcher, in the order of its cost.

A wrong recipe must fail here, in seconds, and not on a cluster, in an hour. The result is the plan the user sees.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samtrain.core.errors import ConfigError, InputError
from samtrain.core.events import Emit, message
from samtrain.data.storage import Url, parse_location
from samtrain.engine.zero_memory import CHECKPOINT_COPY_BYTES
from samtrain.launch.output_dir import OutputDir, resolve_output_dir
from samtrain.recipe import Recipe

if TYPE_CHECKING:
    from samtrain.data.mixture import SampleSet

_PRECISION_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Plan:
    """output: where the run goes. rows: what the user sees, [[name, value], ...]."""

    output: OutputDir
    rows: list[list[str]]


def preflight(recipe: Recipe, *, where: str, emit: Emit, is_here: bool = True) -> Plan:
    """Check a recipe against this machine's files; builds the data set where the recipe says so; emits the plan.

    Args:
        where: what the workers run on, in words. is_here: that is this machine, not a cluster.

    Raises:
        InputError: the first thing that is wrong, with the way out.
    """
    output = resolve_output_dir(recipe)
    parameters = _parameters(recipe)
    choices = _choices(recipe, is_here=is_here)
    disk = _disk_row(recipe, output, parameters)
    _build_data(recipe, emit=emit)
    data_rows, steps_per_epoch = _data_rows(recipe)
    launch, train = recipe.launch, recipe.train
    rows = [
        ["recipe", recipe.name],
        ["output", f"{output.path} ({output.explanation})"],
        ["workers", f"{launch.num_workers} x {launch.cpus_per_worker} CPUs, device {launch.device}, on {where}"],
        ["steps", f"{recipe.total_steps(steps_per_epoch)} of {train.global_batch_size} samples, {train.precision}"],
        *data_rows,
        *_parameter_rows(parameters),
        *choices,
        disk,
        _host_memory_row(recipe, parameters),
    ]
    emit({"kind": "plan", "title": "plan", "rows": rows})
    return Plan(output, rows)


def _parameters(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Part -> (trainable, all) parameters, from shapes alone: a model without storage."""
    from samtrain.model.build import build_empty
    from samtrain.model.freezing import trainable_counts

    model = build_empty(recipe.model)  # also checks that l and k are layers of the Q-Former
    counts = trainable_counts(model)
    if not any(trainable for trainable, _ in counts.values()):
        raise InputError("model.train: nothing trains; set guidance, qformer, projection, vision or language_model")
    return counts


def _parameter_rows(parameters: dict[str, tuple[int, int]]) -> list[list[str]]:
    rows = [
        [part, f"{_count(total)} parameters, {_count(trainable) + ' train' if trainable else 'frozen'}"]
        for part, (trainable, total) in parameters.items()
    ]
    trainable, total = (sum(counts[i] for counts in parameters.values()) for i in (0, 1))
    return [*rows, ["all parts", f"{_count(total)} parameters, {_count(trainable)} train"]]


def _choices(recipe: Recipe, *, is_here: bool) -> list[list[str]]:
    """What the keys come to that depend on the device; only the workers know where they are elsewhere, or have GPUs
    that are not here.

    Raises:
        ConfigError: what is asked for cannot run where the run would.
    """
    from samtrain.launch.devices import device_type, local_gpus
    from samtrain.model.device_choices import choose_for_device
    from samtrain.model.parts import build_config

    model, device = recipe.model, recipe.launch.device
    if device != "cpu" and (not is_here or (device == "cuda" and local_gpus() < recipe.launch.num_workers)):
        asked = {"kernels": model.kernels, "attention": model.attn_implementation, "liger": model.liger}
        asked["compiled vision"] = model.compile_vision
        return [[name, f"{str(value).lower()}; decided where the workers run"] for name, value in asked.items()]
    device = device_type(recipe, num_gpus=local_gpus())
    return choose_for_device(model, build_config(model), device_type=device).rows(model)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _disk_row(recipe: Recipe, output: OutputDir, parameters: dict[str, tuple[int, int]]) -> list[str]:
    """Checkpoints that are kept, one being written, the best one, the exported model (and its copy when tracked)."""
    trainable, total = (sum(counts[i] for counts in parameters.values()) for i in (0, 1))
    exports = 2 if recipe.tracking.log_model else 1
    needed = trainable * CHECKPOINT_COPY_BYTES * (recipe.train.save_total_limit + 2)
    needed += total * _PRECISION_BYTES[recipe.train.precision] * exports
    existing = next(folder for folder in (output.path.absolute(), *output.path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"output_dir: {output.path} needs about {_gib(needed)} for checkpoints and the exported model, "
            f"{existing} has {_gib(free)} free; lower train.save_total_limit, or choose another output_dir"
        )
    return ["disk", f"about {_gib(needed)} needed, {_gib(free)} free"]


def _host_memory_row(recipe: Recipe, parameters: dict[str, tuple[int, int]]) -> list[str]:
    """What saving while training goes on costs; beside the same again where `train.zero.offload` is not none."""
    trainable = sum(count for count, _ in parameters.values())
    size = trainable * CHECKPOINT_COPY_BYTES / recipe.launch.num_workers
    return ["checkpoint copy", f"{_gib(size)} of host memory a worker, from which saves are written in the background"]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _build_data(recipe: Recipe, *, emit: Emit) -> None:
    if recipe.data.build is None:
        return
    if isinstance(parse_location(recipe.data.path), Url):
        raise ConfigError(
            f"data.build: {recipe.data.build} is built in a folder, and data.path is {recipe.data.path}; build it in a "
            f"folder and copy it there, or leave data.build out"
        )
    from samtrain.data.mini import build_mini

    def progress(what: str, done: int, total: int) -> None:
        emit({"kind": "progress", "what": what, "done": done, "total": total})

    report = build_mini(Path(recipe.data.path), recipe.data.mini, progress=progress)
    if not report["reused"]:
        emit(message(f"built {recipe.data.build} in {recipe.data.path}"))


def _data_rows(recipe: Recipe) -> tuple[list[list[str]], int]:
    from samtrain.data.cache import DiskCache
    from samtrain.data.mixture import load_split, open_training_set, sources_of
    from samtrain.data.preflight import check_budgets, check_images, largest_sample
    from samtrain.model.parts import build_processor

    data = recipe.data
    encoder = build_processor(recipe.model, image_size=data.image_size)
    train = open_training_set(data)
    held_out = [*([data.validation_split] if data.validation_split else []), *recipe.evaluation.splits]
    indexes = {
        split: load_split(data.path, split, key="data.path", remote=data.remote) for split in dict.fromkeys(held_out)
    }
    check_budgets(train, encoder, data)
    if data.validation_split:  # the others are generated from, never packed
        check_budgets(indexes[data.validation_split], encoder, data)
    for index in [*sources_of(train).values(), *indexes.values()]:
        check_images(index, data)
    largest = largest_sample(train, encoder)
    steps_per_epoch = math.ceil(len(train) / recipe.train.global_batch_size)
    sizes = [f"{split} {len(index)}" for split, index in indexes.items()]
    if data.mixture:
        rows = _mixture_rows(recipe, train, steps_per_epoch)
        rows += [["held out", f"{data.path}: {', '.join(sizes)} samples"]] if sizes else []
    else:
        sizes = list(dict.fromkeys([f"{data.train_split} {len(train)}", *sizes]))
        rows = [["data", f"{data.path}: {', '.join(sizes)} samples; {steps_per_epoch} steps an epoch"]]
    if any(index.is_remote for index in [*sources_of(train).values(), *indexes.values()]):
        cache = DiskCache(data.remote.cache_dir, max_bytes=data.remote.cache_bytes)
        rows.append(["cache", f"on every node, {cache.describe()}"])
    rows.append(
        [
            "largest sample",
            f"{largest['key']}: {largest['num_tokens']} tokens, {largest['num_images']} images; "
            f"a pack holds {data.max_tokens} tokens, {data.max_images} images",
        ]
    )
    return rows, steps_per_epoch


def _mixture_rows(recipe: Recipe, train: "SampleSet", steps_per_epoch: int) -> list[list[str]]:
    """What the weights come to: a small source with a large one is met more often than people think."""
    from samtrain.data.mixture import shares_of, sources_of

    shares = shares_of(train)
    met = recipe.total_steps(steps_per_epoch) * recipe.train.global_batch_size
    rows = [["mixture", f"{len(train)} samples in all, {steps_per_epoch} steps an epoch"]]
    for name, source in sources_of(train).items():
        times = shares[name] * met / len(source)
        share = f"{100 * shares[name]:.1f} % of those met, each {times:.1f} times in this run"
        rows.append([f"  {name}", f"{source.folder}: {len(source)} samples, {share}"])
    return rows
