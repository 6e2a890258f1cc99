"""What the largest samples ask for, known before weights are loaded.

The index knows every sample's images and text bytes, so a sample's tokens are bounded without reading it:
`tokens of an empty sample with N images + tokens per byte x text bytes (+ seams)`.

- Budgets take one token per byte, which no tokenizer exceeds: only samples above that bound are encoded (for most
  sets none), and no sample over budget is missed.
- Samples that cannot be read are left out here, as in training, which counts them; a set of which nothing can be read
  is refused.
- The largest sample takes 1.25 times the highest rate of 256 samples spread over the set and of the 256 with the
  highest bounds, and encodes, from the highest bound down, those whose bound exceeds the largest found: seconds where
  encoding 70,000 samples takes a minute. It is exact unless a text needs a quarter more tokens per byte than every
  one of those; a higher rate met on the way raises the bounds of the rest.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from samtrain.core.batch import PackedBatch
from samtrain.core.errors import DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER, SampleEncoder
from samtrain.data.index import ShardIndex
from samtrain.data.loader import read_for_generation
from samtrain.data.mixture import SampleSet, folders_of
from samtrain.data.options import DataOptions
from samtrain.data.order import Slot
from samtrain.data.packing import SampleSize, check_fits, pack
from samtrain.data.step import StepBuilder, encode_checked

SEAM_TOKENS = 8  # what joining texts may add: a sentencepiece prefix at each piece, separators
NUM_SPREAD = NUM_CANDIDATES = 256
RATE_MARGIN = 1.25
NUM_DECODED = 16  # samples tried for one whose images decode


def largest_sample(index: SampleSet, encoder: SampleEncoder) -> dict[str, Any]:
    """The sample with the most tokens: {"key", "num_tokens", "num_images"}; exact as the module says.

    Raises:
        DataError: no sample can be used.
    """
    bounds, reader = _Bounds(index, encoder), _Reader(index, encoder)
    spread = range(0, len(index), max(1, len(index) // NUM_SPREAD))
    sizes = reader.sizes(sorted({*spread, *bounds.ranked(1.0)[:NUM_CANDIDATES]}))
    if not sizes:
        sizes = reader.some(range(len(index)), count=1)
    rate = max(bounds.rate(i, size) for i, size in sizes.items())
    largest = max(sizes.values(), key=lambda size: size.num_tokens)
    for i in bounds.ranked(min(1.0, RATE_MARGIN * rate)):
        if bounds.upper(i, min(1.0, RATE_MARGIN * rate)) <= largest.num_tokens:
            continue
        size = sizes.get(i) or reader.size(i)
        if size is None:
            continue
        rate = max(rate, bounds.rate(i, size))
        if size.num_tokens > largest.num_tokens:
            largest = size
    return {"key": largest.key, "num_tokens": largest.num_tokens, "num_images": largest.num_images}


def check_budgets(index: SampleSet, encoder: SampleEncoder, options: DataOptions) -> None:
    """Refuse a set with a sample that no pack can hold; only samples that might be too large are encoded.

    Raises:
        DataError: naming the sample, both counts and the recipe keys to change.
    """
    bounds, reader = _Bounds(index, encoder), _Reader(index, encoder)
    for i in bounds.ranked(1.0):
        if bounds.upper(i, 1.0) > options.max_tokens or index.entries[i].num_images > options.max_images:
            size = reader.size(i)
            if size is not None:
                check_fits(size, max_tokens=options.max_tokens, max_images=options.max_images)


def check_images(index: ShardIndex, options: DataOptions) -> None:
    """Refuse a set whose images cannot be used: of samples spread over it, one must decode.

    Raises:
        DataError: none does; the first reason is named.
    """
    reasons: list[str] = []
    for i in range(0, len(index), max(1, -(-len(index) // NUM_DECODED))):
        try:
            read_for_generation(index, i, options)
            return
        except DataError as error:
            reasons.append(str(error))
    raise DataError(f"{index.folder}: none of {len(reasons)} samples spread over the set can be used: {reasons[0]}")


def largest_pack(index: SampleSet, encoder: SampleEncoder, options: DataOptions) -> PackedBatch:
    """The costliest pack that the largest samples make under the budgets: what a run tries first, for memory.

    Raises:
        DataError: a sample exceeds the budgets, or none can be used.
    """
    entries = index.entries
    ranked = sorted(range(len(index)), key=lambda i: (-entries[i].num_images, -entries[i].text_bytes, i))
    reader = _Reader(index, encoder)
    builder = StepBuilder(index, encoder, options, seed=0, rank=0, world_size=1, augment=False)
    while True:  # until the pictures of the pack are good, too
        sizes = reader.some(ranked, count=NUM_CANDIDATES)
        candidates, measured = list(sizes), list(sizes.values())
        packs = pack(measured, max_tokens=options.max_tokens, max_images=options.max_images)
        costliest = max(packs, key=lambda chosen: sum(measured[i].cost for i in chosen))
        chosen = [candidates[i] for i in costliest]
        step = builder.build([Slot(0, i) for i in chosen], cursor={})
        bad = step.unusable | step.damaged
        if not bad:
            return step.micro_batches[0]
        reader.give_up({chosen[place]: reason for place, reason in bad.items()})


class _Reader:
    """Sizes of samples; those that cannot be used are remembered, not raised."""

    def __init__(self, index: SampleSet, encoder: SampleEncoder) -> None:
        self.index = index
        self.encoder = encoder
        self._bad: dict[int, str] = {}

    def size(self, i: int) -> SampleSize | None:
        return self.sizes([i]).get(i)

    def sizes(self, chosen: Iterable[int]) -> dict[int, SampleSize]:
        """Sample -> size, of those that can be used."""
        tried = [i for i in chosen if i not in self._bad]
        broken = {i: self.index.broken_shards.get(self.index.entries[i].shard) for i in tried}
        self._bad |= {i: reason for i, reason in broken.items() if reason}
        tried = [i for i in tried if i not in self._bad]
        found: dict[int, SampleSize] = {}
        for i, record in zip(tried, self.index.read_records(tried)):
            try:
                if isinstance(record, DataError):
                    raise record
                found[i] = SampleSize(record.key, encode_checked(self.encoder, record).num_tokens, len(record.images))
            except DataError as error:
                self._bad[i] = str(error)
        return found

    def some(self, ranked: Iterable[int], *, count: int) -> dict[int, SampleSize]:
        """The first `count` that can be used, in that order.

        Raises:
            DataError: there is none.
        """
        found: dict[int, SampleSize] = {}
        for i in ranked:
            size = self.size(i)
            if size is not None:
                found[i] = size
                if len(found) == count:
                    break
        if not found:
            reason = next(iter(self._bad.values()), "it is empty")
            raise DataError(f"{', '.join(folders_of(self.index))}: no sample can be used: {reason}")
        return found

    def give_up(self, reasons: Mapping[int, str]) -> None:
        self._bad |= reasons


class _Bounds:
    """Upper bounds of samples' tokens from the index alone."""

    def __init__(self, index: SampleSet, encoder: SampleEncoder) -> None:
        self.entries = index.entries
        self.empty: dict[int, int] = {}  # tokens around the text, by number of images
        for n in {entry.num_images for entry in index.entries}:
            # Placeholders suit every layout; a word, because a prompt may not be empty.
            instruction = IMAGE_PLACEHOLDER * n + "a"
            self.empty[n] = encoder.encode(key="(empty)", instruction=instruction, output="", num_images=n).num_tokens

    def upper(self, i: int, rate: float) -> float:
        entry = self.entries[i]
        return self.empty[entry.num_images] + rate * entry.text_bytes + SEAM_TOKENS

    def rate(self, i: int, size: SampleSize) -> float:
        """The least tokens per byte at which the bound of a measured sample holds."""
        text_tokens = size.num_tokens - self.empty[size.num_images] - SEAM_TOKENS
        return max(0, text_tokens) / max(1, self.entries[i].text_bytes)

    def ranked(self, rate: float) -> list[int]:
        """All samples, highest bound first."""
        return sorted(range(len(self.entries)), key=lambda i: (-self.upper(i, rate), i))
