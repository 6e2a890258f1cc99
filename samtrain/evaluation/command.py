"""`samtrain eval`: an exported model and folders of shards in, predictions and scores out; one process or several."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from samtrain.core.distributed import is_main_process, rank
from samtrain.core.errors import ConfigError, SamtrainError
from samtrain.core.events import Emit, Event, discard
from samtrain.core.options import Options
from samtrain.data.index import ShardIndex
from samtrain.data.options import DataOptions
from samtrain.data.storage import parse_location
from samtrain.evaluation.context_gain import check_context
from samtrain.evaluation.evaluator import evaluate_splits
from samtrain.evaluation.options import EvaluationOptions
from samtrain.evaluation.report import context_gain_table, scores_table
from samtrain.generation.export import check_exported, load_exported
from samtrain.generation.options import GenerationOptions
from samtrain.model.configuration import SamMllmConfig


class EvaluateCommand(Options):
    """checkpoint: an exported folder. data: folders of shards, each a split. output: where predictions go.
    context_gain: as of `EvaluationOptions`."""

    checkpoint: str
    data: list[str] = Field(min_length=1)
    output: str
    batch_size: int = Field(default=8, ge=1)
    max_samples: int | None = Field(default=None, ge=1)
    context_gain: bool = False
    num_workers: int = Field(default=1, ge=1)
    generation: GenerationOptions = GenerationOptions()


def evaluate_folder(command: EvaluateCommand) -> None:
    """Evaluate, write `<output>/<set>/pred.json` and `scores.json`, and print the table.

    Raises:
        InputError: checkpoint or data cannot be used, or the gain of a context is asked for that the model has not.
    """
    # Before any process starts: a wrong folder is one message.
    split_folders(command)
    check_exported(command.checkpoint)
    if command.context_gain:
        check_context(SamMllmConfig.from_pretrained(command.checkpoint))
    if command.num_workers == 1:
        _run(command)
        return
    if 0 < torch.cuda.device_count() < command.num_workers:
        raise ConfigError(f"--num-workers {command.num_workers}: there are {torch.cuda.device_count()} GPUs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    try:
        torch.multiprocessing.spawn(
            _worker, args=(command.model_dump(), port, errors), nprocs=command.num_workers, join=True
        )
    except torch.multiprocessing.ProcessRaisedException:
        if errors.empty():
            raise
        raise errors.get() from None  # the error meant for users, with its exit code


def split_folders(command: EvaluateCommand) -> dict[str, str]:
    """Name of the split (its folder's) -> folder.

    Raises:
        ConfigError: two folders of one name. DataError: a folder without shards.
    """
    folders: dict[str, str] = {}
    for folder in command.data:
        place = parse_location(folder)
        name = place.absolute().name if isinstance(place, Path) else place.name
        if name in folders:
            raise ConfigError(f"--data {folder}: another folder is called {name!r} too; the sets would mix, rename one")
        ShardIndex.load(folder)
        folders[name] = folder
    return folders


def _worker(process_rank: int, values: dict[str, Any], port: int, errors: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=process_rank, world_size=int(values["num_workers"]))
    try:
        _run(EvaluateCommand.model_validate(values))
    except SamtrainError as error:
        errors.put(error)
        raise
    dist.destroy_process_group()


def _run(command: EvaluateCommand) -> None:
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{rank()}"
        torch.cuda.set_device(device)
    model, processor = load_exported(command.checkpoint, device=device)
    with _progress() if is_main_process() else contextlib.nullcontext(discard) as emit:
        result = evaluate_splits(
            model,
            processor,
            split_folders(command),
            options=EvaluationOptions(
                batch_size=command.batch_size,
                max_samples=command.max_samples,
                num_examples=0,
                context_gain=command.context_gain,
            ),
            generation=command.generation,
            data=DataOptions(path="."),
            emit=emit,
        )
    if is_main_process():
        from rich.console import Console

        result.write(command.output)
        Console().print(scores_table(result.scores))
        if result.context_gain:
            Console().print(context_gain_table(result.context_gain))
        print(f"predictions and scores: {command.output}")


@contextlib.contextmanager
def _progress() -> Iterator[Emit]:
    """Bars on stderr for progress events."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(event: Event) -> None:
            if event["what"] not in tasks:
                tasks[event["what"]] = bars.add_task(event["what"], total=event["total"])
            bars.update(tasks[event["what"]], completed=event["done"])

        yield show
