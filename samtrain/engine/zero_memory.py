"""What DeepSpeed ZeRO-3 holds on each GPU, and on the host, from the parameters alone: arithmetic, not measured.

Of deepspeed 0.19.8 as `zero.py` sets it up (a test compares with what two processes hold), for W workers and a
parameter of n elements:

    weights     n / W in the run's precision; frozen towers whole on every rank where they are replicated
    gathered    whole parameters that are in use, fetched ahead, or small enough to stay; two buckets of gradients
    gradients   of what trains, n / W in float32
    optimizer   of what trains, n / W times three in float32: master copy and two moments, in float32 runs too
    update      a float32 copy of one group's gradients, when activations are gone

`offload: optimizer` has gradients and optimizer on the host, and the gradients there twice; `all` has the weights there
too. A run keeps its checkpoint copy on the host besides (`host_copy.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from samtrain.engine.options import TrainOptions

MAX_LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
SUB_GROUP_ELEMENTS = 1_000_000_000  # DeepSpeed's sub_group_size: the update goes through as many elements at a time
CHECKPOINT_COPY_BYTES = 12  # of what trains: the master copy and AdamW's two moments, in float32


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
class Memory:
    """Bytes of one GPU. host: of its worker's host memory, without the checkpoint copy."""

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    update: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """At the highest point; activations and the update are never there together."""
        held = self.weights + self.gathered + self.gradients + self.optimizer
        return held + max(self.activations, self.update)


def memory(
    parameters: Sequence[Parameter],
    *,
    world_size: int,
    activations: float,
    max_live_elements: float,
    bucket_elements: float,
    secondary_size: int | None = None,
    persistence_threshold: int = 0,
    weight_bytes: int = 2,
    offload: Literal["none", "optimizer", "all"] = "none",
) -> Memory:
    """By the module's rules.

    Args:
        max_live_elements: partitioned parameters that are whole at a time, at most. bucket_elements: of gradients.
        secondary_size: ranks over which a second copy of all partitioned weights is spread (ZeRO++ hpZ).
        persistence_threshold: partitioned parameters of at most so many elements stay whole.
        weight_bytes: of an element: 2 in bf16, 4 in float32.
    """
    whole = sum(p.numel for p in parameters if p.is_replicated)
    split = sum(p.numel for p in parameters if not p.is_replicated)
    small = sum(p.numel for p in parameters if not p.is_replicated and p.numel <= persistence_threshold)
    trainable = sum(p.numel for p in parameters if p.is_trainable)
    weights = weight_bytes * (whole + split / world_size)
    if secondary_size and secondary_size < world_size:
        weights += weight_bytes * split / secondary_size
    # Alone, a gathered parameter is a view of its only fragment, unless that is on the host.
    is_copied = world_size > 1 or offload == "all"
    live = small + min(split - small, max_live_elements) if is_copied else 0.0
    buckets = 2.0 * bucket_elements if trainable else 0.0  # the gradients' bucket, and its reduction
    gradients = 4.0 * trainable / world_size
    optimizer = 12.0 * trainable / world_size
    on_host = 0.0
    if offload != "none":
        on_host += 2 * gradients + optimizer
    if offload == "all":
        on_host += weights
    return Memory(
        weights=0.0 if offload == "all" else weights,
        gathered=weight_bytes * (live + buckets),
        gradients=0.0 if offload != "none" else gradients,
        optimizer=0.0 if offload != "none" else optimizer,
        activations=activations,
        update=0.0 if offload != "none" else min(gradients, 4.0 * SUB_GROUP_ELEMENTS),
        host=on_host,
    )


def memory_of_run(
    parameters: Sequence[Parameter], options: TrainOptions, *, world_size: int, activations: float
) -> Memory:
    """What a run with these options holds. Whether frozen parameters are replicated follows from the options.

    What is fetched ahead and kept for its next use is taken at its most: DeepSpeed's own limit, or what a short
    `max_reuse_distance` leaves of it.
    """
    zero = options.zero
    replicates = zero.frozen_towers == "replicated" and zero.offload != "all" and world_size > 1
    placed = [
        Parameter(p.numel, p.part, p.is_trainable, p.has_backward, replicates and not p.is_trainable)
        for p in parameters
    ]
    largest = max((p.numel for p in placed if not p.is_replicated), default=0)
    return memory(
        placed,
        world_size=world_size,
        activations=activations,
        max_live_elements=min(MAX_LIVE_ELEMENTS, zero.max_reuse_distance + zero.prefetch_bucket_size + largest),
        bucket_elements=zero.reduce_bucket_size,
        persistence_threshold=zero.param_persistence_threshold,
        weight_bytes=4 if options.precision == "fp32" else 2,
        offload=zero.offload,
    )


def checkpoint_copy_bytes(parameters: Sequence[Parameter], *, world_size: int) -> float:
    """Host memory of a worker, from which checkpoints are written while training goes on."""
    return CHECKPOINT_COPY_BYTES * sum(p.numel for p in parameters if p.is_trainable) / world_size
