"""Packs of whole samples, and their way to the ranks.

A pack (a micro-batch) holds at most `max_tokens` tokens and `max_images` images, and a sample is never cut. First-fit
decreasing says how many packs the samples of ONE global step need. Every rank gets equally many places for packs,
because ZeRO-3 gathers parameters in every micro-batch on all ranks together, and the samples are spread over these
places by cost; a place without a sample is None, a filler. Everything is a function of the step's sizes alone, so all
ranks compute the same deal.
"""

import heapq
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


def deal(sizes: Sequence[SampleSize], *, max_tokens: int, max_images: int, world_size: int) -> list[list[Pack | None]]:
    """Packs of each rank, equally many (at least one) and as few as first-fit decreasing needs.

    Micro-batches run in step on all ranks, so a round costs what its costliest pack costs. The samples are therefore
    spread over all places of all ranks so that packs cost alike; packs of like cost share a round, and within a round
    the costliest goes to the rank with the least so far. None where a rank runs a filler: fewer samples than places.

    Raises:
        DataError: a sample exceeds a budget.
    """

    def cost(p: Pack) -> float:
        return sum(sizes[i].cost for i in p)

    fewest = pack(sizes, max_tokens=max_tokens, max_images=max_images)
    num_places = max(1, -(-len(fewest) // world_size)) * world_size
    # Where budgets are too tight to spread, the packs are nearly full, and so nearly alike, as they are.
    packs = _spread(sizes, num_places, max_tokens=max_tokens, max_images=max_images) or fewest
    ordered = sorted(packs, key=lambda p: (-cost(p), p))
    hands: list[list[Pack | None]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for start in range(0, num_places, world_size):
        ranks = sorted(range(world_size), key=lambda r: (loads[r], r))
        for place, r in enumerate(ranks):
            chosen = ordered[start + place] if start + place < len(ordered) else None
            hands[r].append(chosen)
            loads[r] += cost(chosen) if chosen else 0.0
    return hands


def _spread(sizes: Sequence[SampleSize], num_packs: int, *, max_tokens: int, max_images: int) -> list[Pack] | None:
    """At most `num_packs` packs of like cost: the costliest sample first, each to the cheapest pack that has room.

    None where a sample finds no room in any.
    """
    packs: list[Pack] = [[] for _ in range(num_packs)]
    room = [(max_tokens, max_images)] * num_packs
    cheapest = [(0.0, p) for p in range(num_packs)]  # a heap
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].cost, i)):
        tokens, images = sizes[i].num_tokens, sizes[i].num_images
        full = []
        while cheapest and not (tokens <= room[cheapest[0][1]][0] and images <= room[cheapest[0][1]][1]):
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, p = cheapest[0]
        packs[p].append(i)
        room[p] = (room[p][0] - tokens, room[p][1] - images)
        heapq.heapreplace(cheapest, (cost + sizes[i].cost, p))
        for item in full:
            heapq.heappush(cheapest, item)
    return [sorted(p) for p in packs if p]
