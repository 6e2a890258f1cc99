"""What DeepSpeed ZeRO-3 moves and holds, from the parameters alone (tests/benchmarks compares with DeepSpeed itself).

In every micro-batch: each partitioned parameter is gathered for the forward pass, and again for the backward pass
where its module has one; the gradients of what trains are reduce-scattered. Frozen parameters are never reduced.
Parameters of at most `persistence_threshold` elements stay whole, and are gathered once after every step. Near the turn
from forward to backward, what is used again within `reuse_distance` elements is not released.

A parameter of n elements takes W * ceil(n / W) elements on the wire.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """In the order in which the forward pass needs them.

    has_backward: its module's backward pass needs it whole. is_replicated: every rank keeps it (frozen towers).
    """

    numel: int
    part: str
    is_trainable: bool
    has_backward: bool
    is_replicated: bool = False


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


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations


def memory(
    parameters: Sequence[Parameter],
    *,
    world_size: int,
    activations: float,
    max_live_elements: float,
    bucket_elements: float,
    secondary_size: int | None = None,
) -> Memory:
    """bf16 weights; float32 gradients, master copies and moments of what trains.

    Args:
        secondary_size: ranks over which a second copy of all partitioned weights is spread (ZeRO++ hpZ).
    """
    whole = sum(p.numel for p in parameters if p.is_replicated)
    split = sum(p.numel for p in parameters if not p.is_replicated)
    trainable = sum(p.numel for p in parameters if p.is_trainable)
    weights = 2.0 * (whole + split / world_size)
    if secondary_size and secondary_size < world_size:
        weights += 2.0 * split / secondary_size
    live = min(split, max_live_elements) if world_size > 1 else 0.0
    buckets = 2.0 * bucket_elements if trainable else 0.0  # the gradients' bucket, and its reduction
    return Memory(
        weights=weights,
        gathered=2.0 * live + buckets,
        gradients=4.0 * trainable / world_size,
        optimizer=12.0 * trainable / world_size,
        activations=activations,
    )
