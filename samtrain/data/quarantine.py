"""Shards that a run gives up: missing, cut off, replaced or unreadable, or mostly garbage.

A shard in quarantine is named once; its samples are skipped from the next step on, also those that could still be
read, because what is known to be broken is not trusted in part. It counts by its share of the set, at once, not by
when its samples are met: a shard of 1 % of the set is 1 % bad also where its samples come first.

Each rank keeps its own (nodes may hold different copies) and takes over what the others found (agree.py).
"""

from collections import Counter
from functools import cached_property

from samtrain.core.batch import IN_QUARANTINE
from samtrain.core.errors import DataError
from samtrain.data.index import ShardError, ShardIndex

MIN_BAD = 8  # bad samples, and more than half of those tried, before a shard that can be read is given up


class Quarantine:
    """The shards of `index` that are not read any more."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.reasons = dict(index.broken_shards)  # shard -> why, in the order found
        self._found = dict(index.broken_shards)  # since `take_found`
        self._tried: Counter[int] = Counter()
        self._bad: Counter[int] = Counter()

    def describe(self, shard: int) -> str:
        """Why a sample of a shard in quarantine is skipped."""
        return f"{IN_QUARANTINE}{self.index.shards[shard]}"

    def add(self, shard: int, reason: str) -> None:
        """Give a shard up."""
        if shard not in self.reasons:
            self.reasons[shard] = self._found[shard] = reason

    def take_over(self, reasons: dict[int, str]) -> None:
        """Give up what other ranks found; it was named by them."""
        for shard, reason in reasons.items():
            self.reasons.setdefault(shard, reason)

    def count_tried(self, shard: int) -> None:
        self._tried[shard] += 1

    def count_bad(self, shard: int, error: DataError) -> None:
        """Note why a sample that was tried is bad; a shard that broke, or has mostly bad ones, is given up."""
        if isinstance(error, ShardError):
            self.add(error.shard, str(error))
        self._bad[shard] += 1
        bad, tried = self._bad[shard], self._tried[shard]
        if bad >= MIN_BAD and 2 * bad > tried:
            path = self.index.folder / self.index.shards[shard]
            self.add(shard, f"{path}: {bad} of the {tried} samples tried are bad")

    def take_found(self) -> dict[int, str]:
        """What was found since the last call."""
        found, self._found = self._found, {}
        return found

    @cached_property
    def samples_of_shard(self) -> Counter[int]:
        """Samples of every shard; counted when it is first asked for."""
        return Counter(entry.shard for entry in self.index.entries)
