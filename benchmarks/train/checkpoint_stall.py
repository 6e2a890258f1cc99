"""How long training stands still for a checkpoint: the trainer's Checkpointer on an engine of the benchmark."""

from pathlib import Path
from typing import Any

from benchmarks.train.loops import Loop
from samtrain.engine.checkpoint import Checkpointer
from samtrain.engine.state import TrainState
from samtrain.model.freezing import part_of


def save_once(loop: Loop, folder: Path) -> dict[str, Any]:
    """Save a checkpoint and return {"bytes"}; the caller takes the time. The loop has made a step."""
    checkpointer = Checkpointer(
        loop.engine, folder, recipe_yaml="name: benchmark\n", save_total_limit=1, part_of=part_of
    )
    path = checkpointer.save(TrainState(global_step=1))
    return {"bytes": sum(file.stat().st_size for file in path.iterdir())}
