"""Volumes and memory of ZeRO-3: by the formula, and by DeepSpeed itself on two processes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.scaling.zero3 import kept_over_the_turn, padded, volumes
from samtrain.engine.zero_memory import Parameter

RANKS = Path(__file__).with_name("zero3_ranks.py")
WORLD = 2


def small_model() -> list[Parameter]:
    """What zero3_ranks.py builds."""
    sizes = {"tower": (9, 14), "adapter": (14, 11), "decoder": (11, 7)}
    return [
        Parameter(n, name, is_trainable=name == "adapter", has_backward=name != "tower")
        for name, (rows, columns) in sizes.items()
        for n in (rows * columns, columns)
    ]


def test_deepspeed_moves_what_the_formula_says(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(WORLD), str(port), str(tmp_path / "seen.json")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        logs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(logs)
    moved = volumes(small_model(), world_size=WORLD, persistence_threshold=20)
    micro_batches = 2
    for step in json.loads((tmp_path / "seen.json").read_text())[1:]:  # the first one also records the order of calls
        assert step["passes"]["gather"] == micro_batches * (moved.forward + moved.backward)
        assert step["passes"]["reduce"] == micro_batches * moved.reduced
        assert step["step"]["gather"] - step["passes"]["gather"] == moved.after_step


def test_frozen_parameters_are_gathered_and_never_reduced() -> None:
    parameters = [
        Parameter(101, "vision", False, False),
        Parameter(203, "language_model", False, True),
        Parameter(407, "language_model", True, True),
        Parameter(5, "guidance", True, True),
    ]
    moved = volumes(parameters, world_size=4, persistence_threshold=10)
    assert moved.forward == 104 + 204 + 408
    assert moved.backward == 204 + 408
    assert moved.reduced == 408 + 8
    assert moved.after_step == 8


def test_replicated_towers_move_nothing() -> None:
    parameters = [Parameter(1000, "vision", False, False, True), Parameter(600, "language_model", False, True, True)]
    moved = volumes(parameters, world_size=8, persistence_threshold=10)
    assert (moved.forward, moved.backward, moved.reduced, moved.after_step) == (0, 0, 0, 0)


def test_the_last_parameters_stay_whole_between_the_passes() -> None:
    parameters = [Parameter(100, "language_model", False, True) for _ in range(4)]
    kept = kept_over_the_turn(parameters, persistence_threshold=10, reuse_distance=300)
    assert [id(p) in kept for p in parameters] == [False, False, True, True]
    moved = volumes(parameters, world_size=2, persistence_threshold=10, reuse_distance=300)
    assert (moved.forward, moved.backward) == (400, 200)


def test_padding_is_to_a_whole_number_of_elements_a_rank() -> None:
    assert padded(10, 4) == 12 and padded(12, 4) == 12 and padded(1, 8) == 8
