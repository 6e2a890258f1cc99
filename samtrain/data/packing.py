"""Packs of whole samples, and their way to the ranks.

The samples of ONE global step are packed first-fit decreasing: a pack (a micro-batch) holds at most `max_tokens`
tokens and `max_images` images, and a sample is never cut. Packs are then dealt to the ranks by cost. Every rank gets
equally many places, because ZeRO-3 gathers parameters in every micro-batch on all ranks together; a place without a
pack is None, a filler. Everything is a function of the step's sizes alone, so all ranks compute the same deal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from samtrain.core.errors import DataError

Pack = list[int]  # positions in the step, ascending

# Cost of an image and of an ordered image pair, in LLM tokens (published 7B shape): ViT-g over 257 patches forward is
# about 2 x 1.0e9 x 257 FLOP, a token through a frozen 7B (forward, and backward to its input) 4 x 6.7e9.
# A pair is the guidance's weighting of one image's patches and W-stream for another: a small part of an image.
TOKENS_PER_IMAGE = 19.0
TOKENS_PER_IMAGE_PAIR = 0.1


@dataclass(frozen=True)
class SampleSize:
    """What a sample takes of a pack's budgets, image spans included in `num_tokens`."""

    key: str
    num_tokens: int
    num_images: int

    @property
    def cost(self) -> float:
        """Expected time, in LLM tokens."""
        pairs = self.num_images * (self.num_images - 1)
        return self.num_tokens + TOKENS_PER_IMAGE * self.num_images + TOKENS_PER_IMAGE_PAIR * pairs


def check_fits(size: SampleSize, *, max_tokens: int, max_images: int) -> None:
    """Refuse a sample that no pack can hold.

    Raises:
        DataError: naming the sample, both counts and the keys to raise.
    """
    if size.num_tokens > max_tokens or size.num_images > max_images:
        raise DataError(
            f"{size.key}: {size.num_tokens} tokens (data.max_tokens = {max_tokens}) and {size.num_images} images "
            f"(data.max_images = {max_images}): raise the budget it exceeds, or leave the sample out; "
            f"samples are never cut"
        )


def pack(sizes: Sequence[SampleSize], *, max_tokens: int, max_images: int) -> list[Pack]:
    """First-fit decreasing by the larger share of the two budgets; equal shares keep the step's order.

    Raises:
        DataError: a sample exceeds a budget.
    """
    for size in sizes:
        check_fits(size, max_tokens=max_tokens, max_images=max_images)

    def share(i: int) -> float:
        return max(sizes[i].num_tokens / max_tokens, sizes[i].num_images / max_images)

    packs: list[Pack] = []
    room: list[tuple[int, int]] = []  # tokens and images left in each pack
    for i in sorted(range(len(sizes)), key=lambda i: (-share(i), i)):
        tokens, images = sizes[i].num_tokens, sizes[i].num_images
        place = next((p for p, (t, m) in enumerate(room) if tokens <= t and images <= m), len(packs))
        if place == len(packs):
            packs.append([])
            room.append((max_tokens, max_images))
        packs[place].append(i)
        room[place] = (room[place][0] - tokens, room[place][1] - images)
    return [sorted(p) for p in packs]


def deal(packs: Sequence[Pack], sizes: Sequence[SampleSize], *, world_size: int) -> list[list[Pack | None]]:
    """Packs of each rank, equally many (at least one), None where a rank runs a filler.

    Micro-batches run in step on all ranks, so a round costs what its costliest pack costs: packs of like cost share
    a round, and within a round the costliest goes to the rank with the least so far (longest processing time first).
    Where the packs do not divide by the ranks, the costliest are split between samples: a smaller micro-batch on an
    idle rank beats a filler.
    """

    def cost(p: Pack) -> float:
        return sum(sizes[i].cost for i in p)

    ordered = sorted(_split_to_multiple(packs, sizes, world_size=world_size), key=lambda p: (-cost(p), p))
    hands: list[list[Pack | None]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for start in range(0, max(1, len(ordered)), world_size):
        ranks = sorted(range(world_size), key=lambda r: (loads[r], r))
        for place, r in enumerate(ranks):
            chosen = ordered[start + place] if start + place < len(ordered) else None
            hands[r].append(chosen)
            loads[r] += cost(chosen) if chosen else 0.0
    return hands


def _split_to_multiple(packs: Sequence[Pack], sizes: Sequence[SampleSize], *, world_size: int) -> list[Pack]:
    result = list(packs)
    while len(result) % world_size:
        splittable = [p for p in result if len(p) > 1]
        if not splittable:
            break
        costliest = max(splittable, key=lambda p: (sum(sizes[i].cost for i in p), p))
        result.remove(costliest)
        halves: list[Pack] = [[], []]
        loads = [0.0, 0.0]
        for i in sorted(costliest, key=lambda i: (-sizes[i].cost, i)):
            lighter = loads.index(min(loads))
            halves[lighter].append(i)
            loads[lighter] += sizes[i].cost
        result += [sorted(half) for half in halves]
    return result
