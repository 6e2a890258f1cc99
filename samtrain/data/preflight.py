"""What the largest samples ask for, known before weights are loaded.

The index knows every sample's images and text bytes, and no tokenizer makes more tokens of a text than it has bytes:
`bound = tokens of an empty sample with N images + text bytes (+ seams)` can only be too high. Samples are encoded
from the highest bound down. Budgets are safe once the bounds fall to them, which is at once for most sets; the
largest sample is exact once the bounds fall to the largest found.
"""

from typing import Any

from samtrain.core.batch import PackedBatch
from samtrain.core.errors import DataError
from samtrain.core.sample import SampleEncoder
from samtrain.data.index import ShardIndex
from samtrain.data.options import DataOptions
from samtrain.data.order import Slot
from samtrain.data.packing import SampleSize, check_fits, pack
from samtrain.data.step import StepBuilder, encode_checked

SEAM_TOKENS = 8  # what joining texts may add: a sentencepiece prefix at each piece, separators
LARGEST_CANDIDATES = 256


def largest_sample(index: ShardIndex, encoder: SampleEncoder) -> dict[str, Any]:
    """The sample with the most tokens: {"key", "num_tokens", "num_images"}; exact.

    Raises:
        DataError: a record on the way cannot be used.
    """
    largest: SampleSize | None = None
    for i, bound in _by_bound(index, encoder):
        if largest is not None and bound <= largest.num_tokens:
            break
        size = _size(index, encoder, i)
        if largest is None or size.num_tokens > largest.num_tokens:
            largest = size
    assert largest is not None  # an index is never empty
    return {"key": largest.key, "num_tokens": largest.num_tokens, "num_images": largest.num_images}


def check_budgets(index: ShardIndex, encoder: SampleEncoder, options: DataOptions) -> None:
    """Refuse a set with a sample that no pack can hold; only samples that might be too large are encoded.

    Raises:
        DataError: naming the sample, both counts and the recipe keys to change.
    """
    for i, bound in _by_bound(index, encoder):
        if bound > options.max_tokens or index.entries[i].num_images > options.max_images:
            size = _size(index, encoder, i)
            check_fits(size, max_tokens=options.max_tokens, max_images=options.max_images)


def largest_pack(index: ShardIndex, encoder: SampleEncoder, options: DataOptions) -> PackedBatch:
    """The costliest pack that the largest samples make under the budgets: what a run tries first, for memory.

    Raises:
        DataError: a sample exceeds the budgets, or cannot be used.
    """
    by_images = sorted(_by_bound(index, encoder), key=lambda item: -index.entries[item[0]].num_images)
    candidates = [i for i, _ in by_images[:LARGEST_CANDIDATES]]
    sizes = [_size(index, encoder, i) for i in candidates]
    packs = pack(sizes, max_tokens=options.max_tokens, max_images=options.max_images)
    costliest = max(packs, key=lambda chosen: sum(sizes[i].cost for i in chosen))
    builder = StepBuilder(index, encoder, options, seed=0, rank=0, world_size=1, augment=False)
    step = builder.build([Slot(0, candidates[i]) for i in costliest], cursor={})
    for reason in step.skipped.values():
        raise DataError(reason)
    return step.micro_batches[0]


def _by_bound(index: ShardIndex, encoder: SampleEncoder) -> list[tuple[int, int]]:
    """(sample, upper bound of its tokens), highest bound first."""
    empty: dict[int, int] = {}
    bounds = []
    for i, entry in enumerate(index.entries):
        n = entry.num_images
        if n not in empty:
            empty[n] = encoder.encode(key="(empty)", instruction="", output="", num_images=n).num_tokens
        bounds.append((i, empty[n] + entry.text_bytes + SEAM_TOKENS))
    return sorted(bounds, key=lambda item: (-item[1], item[0]))


def _size(index: ShardIndex, encoder: SampleEncoder, i: int) -> SampleSize:
    record = index.read_record(i)
    return SampleSize(record.key, encode_checked(encoder, record).num_tokens, len(record.images))
