"""How long training stands still for a checkpoint: the trainer's Checkpointer on an engine of the benchmark.

As the trainer does it: the host's memory is made before, the state is copied at a step's end, threads write it while
training goes on, and the ranks meet again when it is on disk. The bytes are those of what trains, whole, on one GPU.
"""

import time
from pathlib import Path
from typing import Any

from benchmarks.train.loops import OurLoop
from samtrain.engine.checkpoint import Checkpointer
from samtrain.engine.state import TrainState
from samtrain.model.freezing import part_of


def save_while_training(loop: OurLoop, folder: Path) -> dict[str, Any]:
    """Save once, steps going on beside it. The loop has made a step (Adam has its moments), and the device is idle.

    Returns:
        bytes: on disk. prepare_seconds: before a run's first step. stall_seconds: training stood still. seconds: from
        the beginning until the checkpoint was complete. steps_beside, steps_beside_seconds: trained meanwhile.
    """
    checkpointer = Checkpointer(
        loop.engine, folder, recipe_yaml="name: benchmark\n", save_total_limit=1, part_of=part_of
    )
    since = time.perf_counter()
    checkpointer.prepare()
    prepared = time.perf_counter() - since
    checkpointer.begin(TrainState(global_step=1))
    since, steps = time.perf_counter(), 0
    while steps == 0 or not checkpointer.has_news:  # the trainer looks after every step
        loop.step()
        steps += 1
    beside = time.perf_counter() - since
    saved = checkpointer.finish()
    assert saved is not None
    return {
        "bytes": sum(file.stat().st_size for file in saved.path.iterdir()),
        "prepare_seconds": prepared,
        "stall_seconds": saved.stall_seconds,
        "seconds": saved.seconds,
        "steps_beside": steps,
        "steps_beside_seconds": beside,
    }
