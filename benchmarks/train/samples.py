"""One training step's samples, drawn from a seed, and their packs: what every loop of the benchmark is given.

Words and pixels are random; lengths and numbers of images are those of `lengths.py`. Packing and collation are the
trainer's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.train.lengths import Lengths, Text, draw
from benchmarks.train.shapes import ModelShape
from samtrain.core.batch import IGNORE_INDEX, GlobalStep
from samtrain.core.sample import EncodedText
from samtrain.core.seeds import derive_seed
from samtrain.data.collate import ReadySample, collate
from samtrain.data.packing import SampleSize, deal

BOS, EOS = 1, 2
_FIRST_WORD = 3


@dataclass(frozen=True)
class Places:
    """What `collate` needs to know of a model (the part of `SampleEncoder` that is no text and no picture)."""

    image_token_id: int
    num_query_tokens: int
    image_size: int
    pad_token_id: int = 0
    qformer_pad_token_id: int = 0


@dataclass(frozen=True)
class StepData:
    """samples: of the step. packs: the samples of each micro-batch."""

    shape: ModelShape
    text: Text
    samples: tuple[ReadySample, ...]
    packs: tuple[tuple[int, ...], ...]

    @property
    def num_images(self) -> int:
        return sum(len(sample.images) for sample in self.samples)

    @property
    def num_tokens(self) -> int:
        return sum(sample.text.num_tokens for sample in self.samples)

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORE_INDEX for sample in self.samples for label in sample.text.labels)

    def packed(self) -> list[list[ReadySample]]:
        return [[self.samples[i] for i in chosen] for chosen in self.packs]

    def global_step(self) -> GlobalStep:
        """As the loader would hand it to the only rank, from pinned memory where a GPU is in use."""
        places = places_of(self.shape)
        batches = [collate(samples, places) for samples in self.packed()]  # type: ignore[arg-type]
        if torch.cuda.is_initialized():
            batches = [batch.pin_memory() for batch in batches]
        return GlobalStep(tuple(batches), cursor={}, keys=tuple(sample.key for sample in self.samples))

    def describe(self) -> str:
        per_pack = "/".join(str(len(chosen)) for chosen in self.packs)
        return (
            f"{len(self.samples)} samples, {self.num_images} images, {self.num_tokens} tokens "
            f"({self.num_labels} labels) in {len(self.packs)} packs of {per_pack} samples"
        )


def places_of(shape: ModelShape) -> Places:
    return Places(shape.image_token_id, shape.num_query_tokens, shape.image_size)


def draw_step(
    shape: ModelShape, *, text: Text, samples: int, max_images: int, seed: int = 0, words: int | None = None
) -> StepData:
    """The step of a seed.

    Args:
        max_images: budget of a pack; the token budget is the shape's. words: the vocabulary that is used; None: all.
    """
    ready = tuple(
        _sample(shape, lengths, key=f"{text}-{seed}-{i}", words=words)
        for i, lengths in enumerate(draw(text, samples, seed=seed))
    )
    (hand,) = deal(sizes_of(ready), max_tokens=shape.max_tokens, max_images=max_images, world_size=1)
    return StepData(shape, text, ready, tuple(tuple(chosen) for chosen in hand if chosen))


def sizes_of(samples: Sequence[ReadySample]) -> list[SampleSize]:
    return [SampleSize(sample.key, sample.text.num_tokens, len(sample.images)) for sample in samples]


def encoded(
    shape: ModelShape, lengths: Lengths, *, generator: torch.Generator, words: int | None = None
) -> EncodedText:
    """Random words in the `prefix` layout: all images, bos, instruction, answer, eos."""

    def some(count: int, vocabulary: int) -> list[int]:
        end = min(vocabulary, _FIRST_WORD + words) if words else vocabulary
        return torch.randint(_FIRST_WORD, end, (max(0, count),), generator=generator).tolist()

    image_token = shape.image_token_id
    spans = [image_token] * (lengths.images * shape.num_query_tokens)
    prompt = [*spans, BOS, *some(lengths.prompt - 1, image_token)]
    answer = [*some(lengths.answer - 1, image_token), EOS]
    vocabulary = int(shape.qformer.get("vocab_size", 30522))
    return EncodedText(
        input_ids=prompt + answer,
        labels=[IGNORE_INDEX] * len(prompt) + answer,
        qformer_input_ids=some(lengths.qformer_text, vocabulary),
    )


def _sample(shape: ModelShape, lengths: Lengths, *, key: str, words: int | None) -> ReadySample:
    generator = torch.Generator().manual_seed(derive_seed(key))
    size = shape.image_size
    images = [torch.randn(3, size, size, generator=generator) for _ in range(lengths.images)]
    return ReadySample(key, encoded(shape, lengths, generator=generator, words=words), images)
