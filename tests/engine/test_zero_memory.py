"""Arithmetic of ZeRO-3's memory; tests/distributed/test_memory.py compares it with DeepSpeed."""

from dataclasses import replace

import pytest

from samtrain.engine.options import TrainOptions, ZeroOptions
from samtrain.engine.zero_memory import Memory, Parameter, checkpoint_copy_bytes, memory, memory_of_run

FROZEN, TRAINED = Parameter(8_000, "language_model", False, True), Parameter(800, "guidance", True, True)


def held(*, world_size: int = 8, precision: str = "bf16", activations: float = 0.0, **zero: object) -> Memory:
    sizes = {"reduce_bucket_size": 100, "prefetch_bucket_size": 0, "max_reuse_distance": 0}
    sizes |= {"param_persistence_threshold": 0}
    options = TrainOptions(precision=precision, zero=ZeroOptions(**sizes | zero))
    return memory_of_run([FROZEN, TRAINED], options, world_size=world_size, activations=activations)


def test_memory_of_known_cases() -> None:
    parameters = [FROZEN, TRAINED]
    held = memory(parameters, world_size=8, activations=7.0, max_live_elements=1_000, bucket_elements=100)
    assert held.weights == 2 * 1_100 and held.gathered == 2 * 1_000 + 2 * 2 * 100
    assert held.gradients == 400 and held.optimizer == 1_200
    assert held.total == 2_200 + 2_400 + 400 + 1_200 + 400  # the update's copy, for it is more than 7
    hpz = memory(
        parameters, world_size=64, activations=0.0, max_live_elements=1_000, bucket_elements=100, secondary_size=8
    )
    assert hpz.weights == pytest.approx(2 * 8_800 / 64 + 2 * 8_800 / 8)


def test_partitioning_divides_weights_gradients_and_optimizer_and_nothing_else() -> None:
    two, eight = (held(world_size=n, activations=5e4, frozen_towers="partitioned") for n in (2, 8))
    for name in ("weights", "gradients", "optimizer", "update"):
        assert getattr(two, name) == 4 * getattr(eight, name) > 0
    assert two.activations == eight.activations == 5e4 and two.gathered == eight.gathered


def test_replicated_towers_stay_whole_where_there_are_several_workers() -> None:
    assert held(frozen_towers="replicated").weights == 2 * (8_000 + 800 / 8)
    assert held(frozen_towers="partitioned").weights == 2 * (8_800 / 8)
    assert held(frozen_towers="replicated", offload="all").host > 2 * 8_800 / 8
    assert held(world_size=1, frozen_towers="replicated") == held(world_size=1, frozen_towers="partitioned")


def test_offload_moves_bytes_to_the_host() -> None:
    none, optimizer, everything = (held(offload=o, frozen_towers="partitioned") for o in ("none", "optimizer", "all"))
    assert none.host == 0
    assert optimizer.weights == none.weights and optimizer.gradients == optimizer.optimizer == optimizer.update == 0
    assert optimizer.host == none.optimizer + 2 * none.gradients
    assert everything.weights == 0 and everything.host == optimizer.host + none.weights
    assert everything.gathered == none.gathered  # what is in use comes back


def test_what_is_whole_is_the_largest_the_small_and_what_is_kept() -> None:
    buckets = 2 * 2 * 100
    assert held(frozen_towers="partitioned").gathered == 2 * 8_000 + buckets
    assert held(frozen_towers="partitioned", param_persistence_threshold=800).gathered == 2 * 8_800 + buckets
    assert held(frozen_towers="replicated").gathered == 2 * 800 + buckets
    # Alone, whole parameters are views; with offload: all they are copies again.
    assert held(world_size=1).gathered == buckets
    assert held(world_size=1, offload="all").gathered == 2 * 8_000 + buckets


def test_float32_doubles_the_weights_alone() -> None:
    half, full = held(), held(precision="fp32")
    assert (full.weights, full.gathered) == (2 * half.weights, 2 * half.gathered)
    assert (full.gradients, full.optimizer) == (half.gradients, half.optimizer)


def test_the_update_counts_where_activations_are_less() -> None:
    small, large = held(activations=1.0), held(activations=1e6)
    assert small.total - small.update == replace(small, update=0.0, activations=0.0).total
    assert large.total == replace(large, update=0.0).total


def test_the_checkpoint_copy_is_of_what_trains() -> None:
    assert checkpoint_copy_bytes([FROZEN, TRAINED], world_size=8) == 12 * 100
