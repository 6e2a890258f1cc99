"""Shards that a run gives up: missing, cut off, replaced or unreadable, or mostly garbage.

A shard in quarantine is named once; its samples are skipped from the next step on, also those that could still be
read, because what is known to be broken is not trusted in part. It counts by its share of the set, at once, not by
when its samples are met: a shard of 1 % of the set is 1 % bad also where its samples come first.

A rank finds shards that break as a whole while it builds steps ahead (nodes may hold different copies) and tells the
others with the step (agree.py). Garbage is judged there, by what all ranks have seen.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from samtrain.core.batch import IN_QUARANTINE
from samtrain.data.mixture import SampleSet, shares_of, sources_of


class Quarantine:
    """The shards of `index` that this rank does not read any more."""

    def __init__(self, index: SampleSet) -> None:
        self.index = index
        self.reasons = dict(index.broken_shards)  # shard -> why, in the order found
        self._found = dict(index.broken_shards)  # since `take_found`

    def describe(self, shard: int) -> str:
        """Why a sample of a shard in quarantine is skipped."""
        return f"{IN_QUARANTINE}{self.index.shards[shard]}"

    def add(self, shard: int, reason: str) -> None:
        """Give a shard up."""
        if shard not in self.reasons:
            self.reasons[shard] = self._found[shard] = reason

    def take_over(self, reasons: Mapping[int, str]) -> None:
        """Give up what all ranks have agreed on; it needs no telling."""
        for shard, reason in reasons.items():
            self.reasons.setdefault(shard, reason)

    def take_found(self) -> dict[int, str]:
        """What was found since the last call."""
        found, self._found = self._found, {}
        return found

    @cached_property
    def samples_of_shard(self) -> Counter[int]:
        """Samples of every shard; counted when it is first asked for."""
        return Counter(entry.shard for entry in self.index.entries)

    @cached_property
    def share_of_shard(self) -> list[float]:
        """The part of the samples that are met, in the long run, that each shard holds."""
        shares, shards = shares_of(self.index), sources_of(self.index)
        holders = [(shares[name], len(source)) for name, source in shards.items() for _ in source.shards]
        return [share * self.samples_of_shard[i] / length for i, (share, length) in enumerate(holders)]
