"""How full micro-batches are, and how evenly ranks work: our packing and deal, padding, and naive packing.

Counted, not timed: the lengths are real ones (or a stated draw), and a rank's time is the loader's own cost model
(`SampleSize.cost`: tokens, images, pairs). One global step is `SAMPLES_PER_RANK` samples a rank for everyone.

padding: batches of as many samples as the longest ones allow, dealt in order, padded to the longest of the batch.
naive: packs filled in order until a budget is full (what a stream does that packs as samples come), dealt in order.
ours: as many packs as first-fit decreasing needs, the step's samples spread over them by cost.

All ranks run the same number of micro-batches (fillers where one has none), since they call ZeRO-3 together.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samtrain.data.index import ShardIndex
from samtrain.data.packing import Pack, SampleSize, deal

WORLD_SIZES = (1, 2, 8, 64)
SAMPLES_PER_RANK = 16
MAX_TOKENS = 2048
MAX_IMAGES = 32
QUERY_TOKENS = 32  # places of an image in the LLM
NUM_STEPS = 20


@dataclass(frozen=True)
class Lengths:
    """A set's samples: sizes, and the label tokens of each."""

    name: str
    sizes: list[SampleSize]
    labels: list[int]


Hands = list[list[Pack | None]]


def mmlink_lengths(folder: Path) -> Lengths:
    """Of a split of mmlink-mini: text tokens as the index estimates them (4 bytes each), 32 places an image."""
    index = ShardIndex.load(folder)
    sizes, labels = [], []
    for i, entry in enumerate(index.entries):
        record = index.read_record(i)
        answer = _tokens(record.output) + 1
        text = 1 + _tokens(record.instruction) + answer
        sizes.append(SampleSize(entry.key, text + QUERY_TOKENS * entry.num_images, entry.num_images))
        labels.append(answer)
    return Lengths("mmlink-mini, train", sizes, labels)


def long_tailed_lengths(count: int = 20_000, *, seed: int = 0) -> Lengths:
    """1 to 10 images, most have few; instructions and answers log-normal, as instruction sets have them."""
    draw = np.random.default_rng(seed)
    shares = np.array([1 / n for n in range(1, 11)])
    images = draw.choice(np.arange(1, 11), size=count, p=shares / shares.sum())
    instruction = np.clip(np.rint(draw.lognormal(3.4, 0.7, count)), 4, 127).astype(int)
    answer = np.clip(np.rint(draw.lognormal(3.8, 1.0, count)), 2, 256).astype(int)
    sizes = [
        SampleSize(f"s{i}", int(1 + instruction[i] + answer[i] + QUERY_TOKENS * images[i]), int(images[i]))
        for i in range(count)
    ]
    return Lengths("long-tailed, 1 to 10 images", sizes, [int(n) for n in answer])


def ours(sizes: Sequence[SampleSize], world_size: int) -> Hands:
    return deal(sizes, max_tokens=MAX_TOKENS, max_images=MAX_IMAGES, world_size=world_size)


def naive(sizes: Sequence[SampleSize], world_size: int) -> Hands:
    packs: list[Pack] = []
    tokens = images = 0
    for i, size in enumerate(sizes):
        if not packs or tokens + size.num_tokens > MAX_TOKENS or images + size.num_images > MAX_IMAGES:
            packs.append([])
            tokens = images = 0
        packs[-1].append(i)
        tokens, images = tokens + size.num_tokens, images + size.num_images
    return _in_turn(packs, world_size)


def padding(sizes: Sequence[SampleSize], world_size: int) -> Hands:
    """The fixed sample count is what the budgets of one pack hold of the step's largest sample."""
    longest, most = max(s.num_tokens for s in sizes), max(1, *(s.num_images for s in sizes))
    count = max(1, min(MAX_TOKENS // longest, MAX_IMAGES // most))
    return _in_turn([list(range(i, min(i + count, len(sizes)))) for i in range(0, len(sizes), count)], world_size)


METHODS: dict[str, Callable[[Sequence[SampleSize], int], Hands]] = {"padding": padding, "naive": naive, "ours": ours}


def measure(lengths: Lengths, *, num_steps: int = NUM_STEPS, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each method and number of ranks, over `num_steps` steps drawn at random.

    token_occupancy: share of the processed token places (padded ones included; of packs: what they hold of the
        budget) that are tokens. label_occupancy: share that carry a label. imbalance: mean over rounds of the costliest
        rank over the mean rank, fillers included; 1 is even. micro_batches: per rank and step.
    """
    rows = []
    for world_size in WORLD_SIZES:
        draw = random.Random(seed)
        steps = [
            draw.sample(range(len(lengths.sizes)), min(len(lengths.sizes), SAMPLES_PER_RANK * world_size))
            for _ in range(num_steps)
        ]
        for name, method in METHODS.items():
            rows.append(
                {"set": lengths.name, "method": name, "ranks": world_size} | _score(lengths, steps, method, world_size)
            )
    return rows


def _score(
    lengths: Lengths, steps: Sequence[Sequence[int]], method: Callable[..., Hands], world_size: int
) -> dict[str, float]:
    tokens = labels = places = capacity = 0
    ratios, waits, rounds = [], 0.0, 0
    work = 0.0
    for step in steps:
        sizes = [lengths.sizes[i] for i in step]
        hands = method(sizes, world_size)
        assert sorted(i for hand in hands for p in hand for i in p or ()) == list(range(len(sizes)))
        is_padded = method is padding
        for n in range(len(hands[0])):
            costs = [_cost(hand[n], sizes, is_padded=is_padded) for hand in hands]
            ratios.append(max(costs) / (sum(costs) / len(costs)))
            waits += max(costs) * len(costs) - sum(costs)
            work += sum(costs)
            rounds += 1
        for p in (p for hand in hands for p in hand):
            held = sum(sizes[i].num_tokens for i in p or ())
            tokens += held
            labels += sum(lengths.labels[step[i]] for i in p or ())
            places += len(p or ()) * max((sizes[i].num_tokens for i in p or ()), default=0) if is_padded else held
            capacity += MAX_TOKENS
    return {
        "tokens_of_processed": tokens / places,
        "labels_of_processed": labels / places,
        "tokens_of_budget": tokens / capacity,
        "labels_of_budget": labels / capacity,
        "imbalance": sum(ratios) / len(ratios),
        "waiting_share": waits / (waits + work),
        "micro_batches": rounds / len(steps),
    }


def _cost(chosen: Pack | None, sizes: Sequence[SampleSize], *, is_padded: bool) -> float:
    if not chosen:
        return 0.0
    cost = sum(sizes[i].cost for i in chosen)
    if is_padded:
        longest = max(sizes[i].num_tokens for i in chosen)
        cost += sum(longest - sizes[i].num_tokens for i in chosen)
    return cost


def _in_turn(packs: Sequence[Pack], world_size: int) -> Hands:
    """Pack n to rank n modulo the ranks; equally many places."""
    rounds = max(1, -(-len(packs) // world_size))
    return [
        [packs[n * world_size + rank] if n * world_size + rank < len(packs) else None for n in range(rounds)]
        for rank in range(world_size)
    ]


def _tokens(text: str) -> int:
    return -(-len(text.encode()) // 4)
