"""What the context is worth to a model: its loss on held-out answers with the true context, without, and shuffled.

    true      as in training: the W-Former of an image reads the images of its sample
    none      c_i, what the W-Former gives to the Q-Former, is left out
    shuffled  the W-Former reads images of other samples of the set, as many and at the same places (with `all` that of
              the image itself too); the Q-Former reads its own image as ever

The gains are none - true and shuffled - true, in nats per label token. Where both are zero the W-Former is not used;
where only the second is, it is used whatever it reads. A model learns with its context, so `none` is not what a model
trained without one would reach: an independent arm or `guidance.context: own` says that.

Samples without a context to shuffle are left out of `shuffled` alone: with `others` those of one image, whose gain over
`none` is exactly zero, and the only sample of a set. Stand-ins depend on the set alone, so that models compare.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samtrain.core.errors import InputError
from samtrain.core.events import Emit
from samtrain.core.seeds import derive_seed
from samtrain.data.collate import ReadySample, collate
from samtrain.data.index import ShardIndex
from samtrain.data.loader import read_for_generation
from samtrain.data.options import DataOptions
from samtrain.data.step import encode_checked
from samtrain.evaluation.dealing import cost_ordered_batches, deal

if TYPE_CHECKING:
    from samtrain.model import SamMllmConfig, SamMllmForConditionalGeneration, SamMllmProcessor

ImagePlace = tuple[int, int]
"""A sample of a split, and one of its images."""


@dataclass(frozen=True)
class SampleLosses:
    """Summed losses of the answer of one sample. shuffled: None where there is no context to shuffle."""

    num_images: int
    num_label_tokens: int
    true: float
    none: float
    shuffled: float | None


@dataclass(frozen=True)
class ContextGain:
    """Losses and gains of some samples, in nats per label token; intervals are 95 % bootstrap over samples.

    loss, loss_none, gain_none: of all samples. loss_shuffled, gain_shuffled: of `num_shuffled` of them, None where that
    is 0. So gain_shuffled is not loss_shuffled - loss where some samples have no context.
    by_num_images: the same for the samples with so many images.
    """

    num_samples: int
    loss: float
    loss_none: float
    gain_none: float
    gain_none_interval: list[float]
    num_shuffled: int = 0
    loss_shuffled: float | None = None
    gain_shuffled: float | None = None
    gain_shuffled_interval: list[float] | None = None
    by_num_images: "dict[int, ContextGain]" = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Name -> number, without those of no sample."""
        found = {
            "loss": self.loss,
            "loss_context_none": self.loss_none,
            "loss_context_shuffled": self.loss_shuffled,
            "context_gain_none": self.gain_none,
            "context_gain_shuffled": self.gain_shuffled,
        }
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON; those of no sample are null."""
        parts = {str(count): part.to_dict() for count, part in self.by_num_images.items()}
        return vars(self) | {"by_num_images": parts}


def check_context(config: "SamMllmConfig") -> None:
    """Refuse to measure a model that reads no image as the context of another.

    Raises:
        InputError: naming the setting.
    """
    if config.guidance_mode == "none":
        raise InputError("context gain: the model has no guidance (guidance_mode: none), so there is no context")
    if config.guidance_context == "own":
        raise InputError(
            "context gain: the model's W-Former reads its own image alone (guidance_context: own), so there is no "
            "context to leave out or to shuffle; compare its scores instead"
        )


def measure_losses(
    model: "SamMllmForConditionalGeneration",
    processor: "SamMllmProcessor",
    index: ShardIndex,
    sets: Sequence[str],
    *,
    data: DataOptions,
    batch_size: int,
    what: str,
    emit: Emit,
) -> list[SampleLosses]:
    """Losses of the first samples of a split, in order; to be called by all ranks, which all get the whole result.

    One sample at a time, whatever `batch_size`: every sample has losses of its own then, in little memory, and a
    forward pass is cheap beside generating an answer.

    Args:
        model: whole on every rank; `check_context` has passed.
        sets: the set of each sample; stand-ins come from the same set.
        batch_size: samples that a rank reads ahead.

    Raises:
        DataError: a sample cannot be read or does not fit the model.
    """
    counts = [entry.num_images for entry in index.entries[: len(sets)]]
    fewest = 2 if model.config.guidance_context == "others" else 1
    stand_ins = {i: places if counts[i] >= fewest else [] for i, places in _draw_by_set(sets, counts).items()}

    def work(chosen: Sequence[int]) -> list[SampleLosses]:
        index.prefetch_images([j for i in chosen for j in (i, *_samples_of(stand_ins[i]))])
        return [_sample_losses(model, processor, index, i, stand_ins[i], data=data) for i in chosen]

    was_training = model.training
    model.eval()
    try:
        found = deal(cost_ordered_batches(index, len(sets), batch_size=batch_size), work, what=what, emit=emit)
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(sets))]


def context_gains(sets: Sequence[str], losses: Sequence[SampleLosses]) -> dict[str, ContextGain]:
    """Set -> the gain on its samples, and by their numbers of images."""
    gains = {}
    for name in dict.fromkeys(sets):
        members = [sample for own, sample in zip(sets, losses, strict=True) if own == name]
        counts = sorted({sample.num_images for sample in members})
        parts = {n: _gain([sample for sample in members if sample.num_images == n]) for n in counts}
        gains[name] = _gain(members, parts)
    return gains


def draw_stand_ins(counts: Sequence[int], *, seed: int) -> list[list[ImagePlace]]:
    """For every image of every sample an image of another sample: those that follow its own in a ring.

    The ring holds the samples in a random order, but those of equally many images together, so that nearly always one
    sample stands in as a whole, its images in their order.

    Args:
        counts: images of each sample.

    Returns:
        As many as the sample has images, in order; none for a sample whose set has no other images.
    """
    ring = list(range(len(counts)))
    random.Random(seed).shuffle(ring)
    ring.sort(key=lambda i: counts[i])
    images = [(i, slot) for i in ring for slot in range(counts[i])]
    found: list[list[ImagePlace]] = [[] for _ in counts]
    for i, end in zip(ring, accumulate(counts[i] for i in ring)):
        num_others = len(images) - counts[i]
        if num_others:
            found[i] = [images[(end + n % num_others) % len(images)] for n in range(counts[i])]
    return found


def _draw_by_set(sets: Sequence[str], counts: Sequence[int]) -> dict[int, list[ImagePlace]]:
    """Sample -> the images of other samples of its set that stand in for its own."""
    found: dict[int, list[ImagePlace]] = {}
    for name in dict.fromkeys(sets):
        members = [i for i, own in enumerate(sets) if own == name]
        drawn = draw_stand_ins([counts[i] for i in members], seed=derive_seed("context gain", name))
        found |= {i: [(members[j], slot) for j, slot in places] for i, places in zip(members, drawn)}
    return found


def _samples_of(places: Sequence[ImagePlace]) -> list[int]:
    """Each once, in order."""
    return list(dict.fromkeys(i for i, _ in places))


@torch.no_grad()
def _sample_losses(
    model: "SamMllmForConditionalGeneration",
    processor: "SamMllmProcessor",
    index: ShardIndex,
    i: int,
    stand_ins: Sequence[ImagePlace],
    *,
    data: DataOptions,
) -> SampleLosses:
    record, images = read_for_generation(index, i, data)
    sample = ReadySample(
        record.key, encode_checked(processor, record), [processor.pixel_values(image) for image in images]
    )
    batch = collate([sample], processor).to(next(model.parameters()).device)
    inputs = batch.model_inputs()

    def loss(**context: Any) -> float:
        return float(model(**inputs, **context).loss_sum)

    shuffled = None
    if stand_ins:
        others = {j: read_for_generation(index, j, data)[1] for j in _samples_of(stand_ins)}
        pixels = torch.stack([processor.pixel_values(others[j][slot]) for j, slot in stand_ins])
        shuffled = loss(context_pixel_values=pixels.to(batch.pixel_values.device))
    return SampleLosses(
        len(images), batch.num_label_tokens, true=loss(), none=loss(use_context=False), shuffled=shuffled
    )


def _gain(samples: Sequence[SampleLosses], parts: dict[int, ContextGain] | None = None) -> ContextGain:
    """Of at least one sample."""
    tokens = np.array([sample.num_label_tokens for sample in samples])
    true, none = (np.array([getattr(sample, name) for sample in samples]) for name in ("true", "none"))
    gain = ContextGain(
        num_samples=len(samples),
        loss=float(true.sum() / tokens.sum()),
        loss_none=float(none.sum() / tokens.sum()),
        gain_none=float((none - true).sum() / tokens.sum()),
        gain_none_interval=_interval(none - true, tokens),
        by_num_images=parts or {},
    )
    has_shuffled = np.array([sample.shuffled is not None for sample in samples])
    if not has_shuffled.any():
        return gain
    tokens, true = tokens[has_shuffled], true[has_shuffled]
    shuffled = np.array([sample.shuffled for sample in samples if sample.shuffled is not None])
    return replace(
        gain,
        num_shuffled=len(shuffled),
        loss_shuffled=float(shuffled.sum() / tokens.sum()),
        gain_shuffled=float((shuffled - true).sum() / tokens.sum()),
        gain_shuffled_interval=_interval(shuffled - true, tokens),
    )


def _interval(sums: np.ndarray, tokens: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> list[float]:
    """95 % percentile interval [low, high] of sums / tokens over all samples, resampled by samples."""
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(0, len(sums), len(sums)) for _ in range(num_resamples))
    low, high = np.percentile([sums[some].sum() / tokens[some].sum() for some in drawn], [2.5, 97.5])
    return [float(low), float(high)]
