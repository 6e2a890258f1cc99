"""The study: every recipe, strategy and number of GPUs, as rows of figures. Pure functions of the assumptions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.scaling.network import Network
from benchmarks.scaling.parts import FORWARD_SHARE, PARTS, PartSeconds
from benchmarks.scaling.recipes import RankWork, Recipe, Workload, parameters_of, slowest, total_seconds
from benchmarks.scaling.simulate import Bucket, Timeline, simulate
from benchmarks.scaling.zero3 import is_gathered, kept_over_the_turn, volumes
from samtrain.engine.zero_memory import Parameter, memory

WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
SAMPLES_PER_GPU = 16  # the recipes' 128 on 8 GPUs
LEAST_EFFICIENCY = 0.8
HBM = 4.3e12  # bytes a second that the update reaches; H200
UPDATE_BYTES = 30  # of a trainable parameter: master, moments, gradient, weight
PERSISTENCE_THRESHOLD, REUSE_DISTANCE, MAX_LIVE = 100_000, 1_000_000_000, 1_000_000_000  # samtrain's and DeepSpeed's
# Of a token, layer and unit of width, bf16: 37.0 GB counted for 8,033 tokens of the 7B, frozen, by `samtrain plan
# --memory`. 26 with Liger, which not every run has.
ACTIVATION_BYTES = 36
KEPT_BYTES = 2  # the same under gradient checkpointing: the layer's input

Scaling = Literal["weak", "strong"]


@dataclass(frozen=True)
class Strategy:
    """bucket: elements that are gathered, and reduced, together. secondary: hpZ's second partition, inside a node.

    batch: times the samples of a GPU, and the budgets of a pack.
    """

    name: str
    label: str
    replicate_frozen: bool = False
    bucket: int = 50_000_000
    secondary: bool = False
    batch: int = 1


STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy("partitioned", "everything partitioned, buckets of 50 M elements"),
        Strategy("large_buckets", "buckets of 500 M elements", bucket=500_000_000),
        Strategy("hpz", "and a second partition inside a node (hpZ)", bucket=500_000_000, secondary=True),
        Strategy("batch", "buckets of 500 M, and four times the samples in a pack", bucket=500_000_000, batch=4),
        Strategy("replicated", "frozen weights replicated", replicate_frozen=True, bucket=500_000_000),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What the study stands on."""

    network: Network
    seconds: PartSeconds
    gpu_bytes: float = 141e9

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": vars(self.network),
            "mfu_of_parts": self.seconds.mfu,
            "mfu_source": self.seconds.source,
            "is_measured": self.seconds.is_measured,
            "peak_flops": self.seconds.peak,
            "gpu_bytes": self.gpu_bytes,
            "samples_per_gpu": SAMPLES_PER_GPU,
        }


def study(
    recipe: Recipe, workload: Workload, assumptions: Assumptions, *, scaling: Scaling = "weak",
    strategies: Sequence[str] = tuple(STRATEGIES), world_sizes: Sequence[int] = WORLD_SIZES,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every strategy and number of GPUs; weak: 16 samples a GPU, strong: 128 in all."""
    plain = parameters_of(recipe)
    rows = []
    for name in strategies:
        strategy = STRATEGIES[name]
        parameters = parameters_of(recipe, replicate_frozen=True) if strategy.replicate_frozen else plain
        first: float | None = None
        for world_size in world_sizes:
            samples = SAMPLES_PER_GPU * (world_size if scaling == "weak" else 8) * strategy.batch
            if samples < world_size:
                continue
            rounds = workload.rounds(samples=samples, world_size=world_size, packs=strategy.batch)
            row = step_row(recipe, strategy, parameters, rounds, assumptions, world_size=world_size)
            row["samples_per_second_per_gpu"] = samples / world_size / row["step_seconds"]
            first = first or row["samples_per_second_per_gpu"]
            row["efficiency"] = row["samples_per_second_per_gpu"] / first
            rows.append({"recipe": recipe.name, "scaling": scaling, "strategy": name, "samples": samples, **row})
    return rows


def step_row(
    recipe: Recipe, strategy: Strategy, parameters: Sequence[Parameter], rounds: Sequence[Sequence[RankWork]],
    assumptions: Assumptions, *, world_size: int,
) -> dict[str, Any]:  # fmt: skip
    """One step: its time and where it goes, what is moved and held, and which share of the peak is real work."""
    network, seconds = assumptions.network, assumptions.seconds
    node = min(world_size, network.gpus_per_node)
    timelines = []
    for works in rounds:
        buckets = buckets_of(recipe, strategy, parameters, slowest(works, seconds), world_size=world_size)
        timelines.append(
            simulate(
                buckets,
                gather=lambda n: network.seconds(2.0 * n, world_size),
                gather_again=lambda n: network.seconds(2.0 * n, node if strategy.secondary else world_size),
                reduce=lambda n: network.seconds(2.0 * n, world_size),
                max_live_elements=max(MAX_LIVE, 2 * strategy.bucket),
            )
        )
    trainable = sum(p.numel for p in parameters if p.is_trainable)
    update = UPDATE_BYTES * trainable / world_size / HBM
    total = sum(t.total for t in timelines) + update
    work = [work for works in rounds for work in works]
    mean = sum(total_seconds(w, seconds) for w in work) / world_size
    recomputed = _recomputed(recipe, work, seconds) / world_size
    moved = volumes(
        parameters, world_size=world_size, persistence_threshold=PERSISTENCE_THRESHOLD, reuse_distance=REUSE_DISTANCE
    )
    held = memory(
        parameters,
        world_size=world_size,
        activations=activations(recipe, max(w.tokens for w in work)),
        max_live_elements=MAX_LIVE,
        bucket_elements=strategy.bucket,
        secondary_size=network.gpus_per_node if strategy.secondary else None,
    )
    return {
        "world_size": world_size,
        "step_seconds": total,
        "rounds": len(rounds),
        "mfu": sum(w.total for w in work) / world_size / total / seconds.peak,
        "exposed_communication": _exposed(timelines) / total,
        "imbalance": (sum(t.compute for t in timelines) - mean - recomputed) / total,
        "communication_busy": sum(t.busy for t in timelines) / total,
        "gathered_bytes": 2.0 * len(rounds) * (moved.forward + moved.backward),
        "reduced_bytes": 2.0 * len(rounds) * moved.reduced,
        "memory_bytes": held.total,
        "memory": vars(held),
        "fits": held.total < assumptions.gpu_bytes,
    }


def buckets_of(
    recipe: Recipe,
    strategy: Strategy,
    parameters: Sequence[Parameter],
    part_seconds: dict[str, float],
    *,
    world_size: int,
) -> list[Bucket]:
    """Runs of parameters of one part, each at most the strategy's bucket; a part's time is spread by parameters."""
    kept = kept_over_the_turn(parameters, persistence_threshold=PERSISTENCE_THRESHOLD, reuse_distance=REUSE_DISTANCE)
    sizes = {part: sum(p.numel for p in parameters if _timed_part(p) == part) for part in PARTS}
    runs: list[list[Parameter]] = []
    for p in parameters:
        full = runs and sum(q.numel for q in runs[-1]) + p.numel > strategy.bucket
        if not runs or full or _timed_part(runs[-1][-1]) != _timed_part(p):
            runs.append([])
        runs[-1].append(p)
    buckets = []
    for run in runs:
        part, numel = _timed_part(run[0]), sum(p.numel for p in run)
        spent = part_seconds[part] * numel / sizes[part]
        share = FORWARD_SHARE[recipe.train][part]
        again = spent * share if recipe.checkpointing and part == "language_model" else 0.0
        gathered = [p for p in run if is_gathered(p, persistence_threshold=PERSISTENCE_THRESHOLD) and world_size > 1]
        buckets.append(
            Bucket(
                gathered=sum(p.numel for p in gathered),
                gathered_again=sum(p.numel for p in gathered if p.has_backward and id(p) not in kept),
                reduced=sum(p.numel for p in run if p.is_trainable),
                forward=spent * share,
                backward=spent * (1 - share) + again,
            )
        )
    return buckets


def stops_at(rows: Sequence[dict[str, Any]]) -> int | None:
    """The first number of GPUs on which one does less than 80 % of what it does on 8; None: it never does."""
    return next((row["world_size"] for row in rows if row["efficiency"] < LEAST_EFFICIENCY), None)


def activations(recipe: Recipe, tokens: int) -> float:
    """Bytes that a micro-batch of so many LLM tokens keeps for its backward pass."""
    text = recipe.shape.config(guided=True).text_config
    layer = float(ACTIVATION_BYTES * text.hidden_size * tokens)
    if not recipe.checkpointing:
        return layer * text.num_hidden_layers
    return KEPT_BYTES * text.hidden_size * tokens * text.num_hidden_layers + layer


def _timed_part(p: Parameter) -> str:
    return p.part if p.part in ("vision", "language_model") else "qformer"


def _recomputed(recipe: Recipe, works: Sequence[RankWork], seconds: PartSeconds) -> float:
    """Seconds of all ranks together."""
    if not recipe.checkpointing:
        return 0.0
    share = FORWARD_SHARE[recipe.train]["language_model"]
    return sum(share * seconds.of("language_model", w.language_model) for w in works)


def _exposed(timelines: Sequence[Timeline]) -> float:
    return sum(t.exposed for t in timelines)
