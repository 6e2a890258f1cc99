"""What DeepSpeed ZeRO-3 moves, from the parameters alone (tests/benchmarks compares with DeepSpeed itself).

In every micro-batch: each partitioned parameter is gathered for the forward pass, and again for the backward pass
where its module has one; the gradients of what trains are reduce-scattered. Frozen parameters are never reduced.
Parameters of at most `persistence_threshold` elements stay whole, and are gathered once after every step. Near the turn
from forward to backward, what is used again within `reuse_distance` elements is not released.

A parameter of n elements takes W * ceil(n / W) elements on the wire.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from samtrain.engine.zero_memory import Parameter


@dataclass(frozen=True)
class Volumes:
    """Elements, padded. forward, backward: gathered in a micro-batch; reduced: in one. after_step: gathered, once."""

    forward: int
    backward: int
    reduced: int
    after_step: int


def padded(numel: int, world_size: int) -> int:
    return world_size * -(-numel // world_size)


def is_gathered(parameter: Parameter, *, persistence_threshold: int) -> bool:
    return parameter.numel > persistence_threshold and not parameter.is_replicated


def volumes(
    parameters: Sequence[Parameter], *, world_size: int, persistence_threshold: int, reuse_distance: int = 0
) -> Volumes:
    """What one rank sends and receives, as if every collective brought in all its elements."""
    sizes = [
        (padded(p.numel, world_size), p)
        for p in parameters
        if is_gathered(p, persistence_threshold=persistence_threshold)
    ]
    kept = kept_over_the_turn(parameters, persistence_threshold=persistence_threshold, reuse_distance=reuse_distance)
    return Volumes(
        forward=sum(size for size, _ in sizes),
        backward=sum(size for size, p in sizes if p.has_backward and id(p) not in kept),
        reduced=sum(padded(p.numel, world_size) for p in parameters if p.is_trainable),
        after_step=sum(
            padded(p.numel, world_size) for p in parameters if p.numel <= persistence_threshold and not p.is_replicated
        ),
    )


def kept_over_the_turn(parameters: Sequence[Parameter], *, persistence_threshold: int, reuse_distance: int) -> set[int]:
    """ids of the parameters that the forward pass does not release: both ways to their next use are counted."""
    kept: set[int] = set()
    away = 0
    for p in reversed(parameters):
        if not is_gathered(p, persistence_threshold=persistence_threshold):
            continue
        away += 2 * p.numel  # from its forward to its backward pass lies everything after it, twice
        if away - p.numel > reuse_distance:
            break
        kept.add(id(p))
    return kept
