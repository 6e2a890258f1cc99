"""The recipes that are scaled: parameters in the order of the forward pass, arithmetic of real samples, and packs.

What a recipe is follows from `benchmarks.train.shapes`; samples have the lengths of `benchmarks.train.lengths`; packs
and deals are the loader's own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.scaling.parts import PARTS, PartSeconds
from benchmarks.train.lengths import Lengths, Text, draw
from benchmarks.train.shapes import ModelShape, Train, trains
from samtrain.data.packing import Pack, SampleSize, deal
from samtrain.engine.zero_memory import Parameter
from samtrain.launch.memory_plan import parameters_in
from samtrain.model.flops import FlopCounter


@dataclass(frozen=True)
class Recipe:
    """checkpointing: of the LLM's layers; it adds a forward pass to the time and nothing to the work."""

    shape: ModelShape
    train: Train
    checkpointing: bool

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.train}"


@dataclass(frozen=True)
class RankWork:
    """Real floating-point operations of one rank's micro-batch, forward and backward, per part; zeros: a filler."""

    vision: float = 0.0
    qformer: float = 0.0
    language_model: float = 0.0
    tokens: int = 0
    images: int = 0

    @property
    def total(self) -> float:
        return self.vision + self.qformer + self.language_model


def parameters_of(recipe: Recipe, *, replicate_frozen: bool = False) -> list[Parameter]:
    """From shapes alone. The vision tower is frozen and has nothing trainable below it: no backward pass."""
    from benchmarks.train.models import construct_ours
    from samtrain.model.freezing import apply_freezing
    from samtrain.model.lora import attach_lora

    options, meta = trains(recipe.train, guided=True), torch.device("meta")
    model = construct_ours(recipe.shape, guided=True, dtype=torch.bfloat16, device=meta)
    if options.language_model == "lora":
        with meta:
            attach_lora(model, options.lora)
    apply_freezing(model, options)
    return [replace(p, is_replicated=replicate_frozen and not p.is_trainable) for p in parameters_in(model)]


class Workload:
    """Draws a global step and says what every rank computes in every round of micro-batches."""

    def __init__(self, recipe: Recipe, *, text: Text, seed: int = 0) -> None:
        self.recipe, self.text, self.seed = recipe, text, seed
        self._drawn: dict[tuple[int, int, int], list[list[RankWork]]] = {}
        config = recipe.shape.config(guided=True)
        self._counter = FlopCounter(config, trains(recipe.train, guided=True), image_size=recipe.shape.image_size)

    def rounds(self, *, samples: int, world_size: int, packs: int = 1) -> list[list[RankWork]]:
        """[round][rank], of one step of `samples` samples, drawn and packed once; packs: times the recipe's budgets."""
        key = (samples, world_size, packs)
        if key not in self._drawn:
            self._drawn[key] = self._rounds(samples, world_size, packs)
        return self._drawn[key]

    def _rounds(self, samples: int, world_size: int, packs: int) -> list[list[RankWork]]:
        shape = self.recipe.shape
        lengths = _lengths(self.text, samples, self.seed)
        budgets = (packs * shape.max_tokens, packs * shape.max_images)
        hands = _dealt(self.text, samples, self.seed, shape.num_query_tokens, *budgets, world_size)
        works: dict[Lengths, RankWork] = {}
        for one in lengths:
            if one not in works:
                works[one] = self._work(size_of(one, shape.num_query_tokens), one.answer, one.qformer_text)
        return [[_sum([works[lengths[i]] for i in hand[r] or ()]) for hand in hands] for r in range(len(hands[0]))]

    def _work(self, size: SampleSize, num_labels: int, num_text_tokens: int) -> RankWork:
        flops = self._counter.sample(
            num_tokens=size.num_tokens,
            num_labels=num_labels,
            num_images=size.num_images,
            num_text_tokens=num_text_tokens,
        )
        return RankWork(flops.vision, flops.qformer, flops.language_model, size.num_tokens, size.num_images)


def slowest(works: Sequence[RankWork], seconds: PartSeconds) -> dict[str, float]:
    """Part -> seconds on the slowest rank: what all wait for where every bucket is a collective."""
    return {part: max(seconds.of(part, getattr(work, part)) for work in works) for part in PARTS}


def total_seconds(work: RankWork, seconds: PartSeconds) -> float:
    return sum(seconds.of(part, getattr(work, part)) for part in PARTS)


def size_of(lengths: Lengths, num_query_tokens: int, *, key: str = "") -> SampleSize:
    """What a sample of these lengths takes of a pack."""
    num_tokens = lengths.prompt + lengths.answer + lengths.images * num_query_tokens
    return SampleSize(key, num_tokens, lengths.images)


# Which samples meet on a rank depends on lengths and budgets alone: recipes of one text share these.


@functools.lru_cache
def _lengths(text: Text, samples: int, seed: int) -> list[Lengths]:
    return draw(text, samples, seed=seed)


@functools.lru_cache
def _dealt(
    text: Text, samples: int, seed: int, num_query_tokens: int, max_tokens: int, max_images: int, world_size: int
) -> list[list[Pack | None]]:
    sizes = [size_of(one, num_query_tokens, key=str(i)) for i, one in enumerate(_lengths(text, samples, seed))]
    return deal(sizes, max_tokens=max_tokens, max_images=max_images, world_size=world_size)


def _sum(works: Sequence[RankWork]) -> RankWork:
    return RankWork(
        vision=sum(work.vision for work in works),
        qformer=sum(work.qformer for work in works),
        language_model=sum(work.language_model for work in works),
        tokens=sum(work.tokens for work in works),
        images=sum(work.images for work in works),
    )
