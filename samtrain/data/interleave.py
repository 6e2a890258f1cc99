"""Which source of a mixture comes next: a pure function of (weights, seed, position).

The endless sequence is cut into blocks. After b blocks a source has had its share of their positions, rounded by
largest remainder: never off by a whole sample at a block's border, so nothing drifts, and any position is found
without those before it. Within a block the sources are shuffled by (seed, block).
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from samtrain.core.seeds import derive_seed

MIN_BLOCK = 256  # positions; more where a source is rarer than that
_MAX_KEPT = 2  # a step reaches into two blocks as a rule


class Interleaving:
    """The endless sequence of sources.

    weights: as whole numbers in lowest terms, so equal proportions are equal weights.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.weights = whole_weights(weights)
        self.seed = seed
        self._total = sum(self.weights)
        # Every source has a place in every block: only then is a share after b + 1 blocks never below that after b.
        self.block = max(MIN_BLOCK, -(-self._total // min(self.weights)))
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def places(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the positions start..stop-1: [n] the source, and [n] how often that source came before; both int64."""
        blocks = range(start // self.block, -(-stop // self.block))
        found = [self._layout(b) for b in blocks]
        cut = slice(start - blocks.start * self.block, stop - blocks.start * self.block)
        return np.concatenate([s for s, _ in found])[cut], np.concatenate([t for _, t in found])[cut]

    def turns(self, position: int) -> list[int]:
        """How often each source came before `position`."""
        b, offset = divmod(position, self.block)
        inside = np.bincount(self._layout(b)[0][:offset], minlength=len(self.weights))
        return [before + int(n) for before, n in zip(self._before(b), inside)]

    def _before(self, b: int) -> list[int]:
        """Positions that each source has in the first `b` blocks; exact for any b."""
        n = b * self.block
        counts = [n * weight // self._total for weight in self.weights]
        remainders = [n * weight % self._total for weight in self.weights]
        largest = sorted(range(len(counts)), key=lambda i: (-remainders[i], i))
        for i in largest[: n - sum(counts)]:
            counts[i] += 1
        return counts

    def _layout(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources, turns) of block `b`, [block] each."""
        if b not in self._kept:
            if len(self._kept) == _MAX_KEPT:
                self._kept.pop(next(iter(self._kept)))
            before = self._before(b)
            quotas = np.subtract(self._before(b + 1), before)
            words = np.random.PCG64(derive_seed(self.seed, "mixture", b)).random_raw(self.block)
            sources = np.repeat(np.arange(len(quotas)), quotas)[np.argsort(words, kind="stable")]
            turns = np.empty(self.block, dtype=np.int64)
            # A stable sort by source lists each source's positions in order: they are its next turns.
            turns[np.argsort(sources, kind="stable")] = np.concatenate(
                [first + np.arange(quota) for first, quota in zip(before, quotas)]
            )
            self._kept[b] = sources, turns
        return self._kept[b]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The proportions of `weights` (as they are written, 0.1 is a tenth) in whole numbers, lowest terms."""
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * denominator) for weight in exact]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]
