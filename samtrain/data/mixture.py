"""What a run trains on: one split of shards, or several sources mixed by weight.

`MixedIndex` shows several sets as one: entries and shards follow one another, and keys and shards carry the source's
name in front (`name/key`), so that two sources with the same keys stay apart in ledger, log and quarantine.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord
from samtrain.data.index import ShardError, ShardIndex
from samtrain.data.options import DataOptions, RemoteOptions
from samtrain.data.order import SampleOrder, Source
from samtrain.data.storage import parse_location


class MixedIndex:
    """The samples of several sources, with the face of a `ShardIndex`.

    sources: name -> index; sorted by name, so that the order in which a recipe lists them means nothing.
    weights: name -> its share of the samples that are met, relative to the others'.
    """

    def __init__(self, sources: Mapping[str, ShardIndex], weights: Mapping[str, float]) -> None:
        self.sources = dict(sorted(sources.items()))
        self.weights = dict(weights)
        self._names = list(self.sources)
        self._indexes = list(self.sources.values())
        self._first_samples = [0, *accumulate(len(index) for index in self._indexes)][:-1]
        self._first_shards = [0, *accumulate(len(index.shards) for index in self._indexes)][:-1]
        members = [[name, index.digest] for name, index in self.sources.items()]
        self.digest = hashlib.sha256(json.dumps(members).encode()).hexdigest()
        self.shards = [f"{name}/{shard}" for name, index in self.sources.items() for shard in index.shards]
        self.broken_shards = {
            first + shard: reason
            for first, index in zip(self._first_shards, self._indexes)
            for shard, reason in index.broken_shards.items()
        }
        self.entries = [
            replace(entry, key=f"{name}/{entry.key}", shard=first + entry.shard)
            for name, index, first in zip(self._names, self._indexes, self._first_shards)
            for entry in index.entries
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def read_record(self, i: int) -> SampleRecord:
        """The record of sample `i`; its key is `name/key`."""
        n, own = self._place(i)
        with self._own_shards(n):
            record = self._indexes[n].read_record(own)
        return replace(record, key=self.entries[i].key)

    def read_records(self, samples: Sequence[int]) -> list[SampleRecord | DataError]:
        """As `ShardIndex.read_records`."""
        found: dict[int, SampleRecord | DataError] = {}
        for n, places in self._by_source(samples).items():
            records = self._indexes[n].read_records([self._place(samples[p])[1] for p in places])
            for p, record in zip(places, records):
                if isinstance(record, ShardError):
                    record = self._renumbered(n, record)
                elif isinstance(record, SampleRecord):
                    record = replace(record, key=self.entries[samples[p]].key)
                found[p] = record
        return [found[p] for p in range(len(samples))]

    def prefetch_images(self, samples: Sequence[int]) -> None:
        """As `ShardIndex.prefetch_images`."""
        by_source = self._by_source(samples)
        for n, index in enumerate(self._indexes):
            index.prefetch_images([self._place(samples[p])[1] for p in by_source.get(n, ())])

    def read_images(self, i: int, record: SampleRecord, *, verify: bool = True) -> list[bytes]:
        """As `ShardIndex.read_images`."""
        n, own = self._place(i)
        with self._own_shards(n):
            return self._indexes[n].read_images(own, record, verify=verify)

    def _place(self, i: int) -> tuple[int, int]:
        """The source of sample `i`, and its number there."""
        n = bisect_right(self._first_samples, i) - 1
        return n, i - self._first_samples[n]

    def _by_source(self, samples: Sequence[int]) -> dict[int, list[int]]:
        """Source -> the places in `samples` of those it holds."""
        places: dict[int, list[int]] = {}
        for p, i in enumerate(samples):
            places.setdefault(self._place(i)[0], []).append(p)
        return places

    def _renumbered(self, n: int, error: ShardError) -> ShardError:
        return ShardError(str(error), shard=self._first_shards[n] + error.shard)

    @contextmanager
    def _own_shards(self, n: int) -> Iterator[None]:
        """A shard that breaks in source `n` is named by its number among all."""
        try:
            yield
        except ShardError as error:
            raise self._renumbered(n, error) from None


SampleSet = ShardIndex | MixedIndex


def sources_of(index: SampleSet) -> dict[str, ShardIndex]:
    """Name -> index of every source; of a set by itself, the only one has the name ""."""
    return index.sources if isinstance(index, MixedIndex) else {"": index}


def shares_of(index: SampleSet) -> dict[str, float]:
    """Name -> the source's share of the samples that are met."""
    weights = index.weights if isinstance(index, MixedIndex) else {"": 1.0}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def folders_of(index: SampleSet) -> list[str]:
    """Where the shards are, for messages."""
    return [str(source.folder) for source in sources_of(index).values()]


def open_training_set(data: DataOptions, *, tolerate_broken_shards: bool = False) -> SampleSet:
    """The training split, or the mixture.

    Args:
        tolerate_broken_shards: as of `ShardIndex.load`.

    Raises:
        DataError: a split is missing or cannot be used; the source is named.
    """
    if not data.mixture:
        return load_split(
            data.path,
            data.train_split,
            key="data.path",
            remote=data.remote,
            tolerate_broken_shards=tolerate_broken_shards,
        )
    sources = {
        source.name: load_split(
            source.path,
            source.split or data.train_split,
            key=f"data.mixture: {source.name}",
            remote=data.remote,
            tolerate_broken_shards=tolerate_broken_shards,
        )
        for source in data.mixture
    }
    return MixedIndex(sources, {source.name: source.weight for source in data.mixture})


def load_split(
    path: str, split: str, *, key: str, remote: RemoteOptions | None = None, tolerate_broken_shards: bool = False
) -> ShardIndex:
    """The index of a split.

    Args:
        path: a folder, or a URL in an object store.
        key: where the recipe names `path`, for messages.
        remote, tolerate_broken_shards: as of `ShardIndex.load`.

    Raises:
        DataError: there is no such split, and what there is; or it cannot be used.
    """
    place = parse_location(path)
    folder = place / split
    if isinstance(place, Path) and not (place / split).is_dir():
        there = sorted(path.name for path in place.glob("*") if path.is_dir())
        found = f"it holds {', '.join(there)}" if there else "it does not exist, or holds no folders"
        raise DataError(
            f"{key}: {path} has no split {split!r} ({found}); the recipe names splits in data.train_split, "
            f"data.validation_split, data.mixture and evaluation.splits"
        )
    return ShardIndex.load(folder, tolerate_broken_shards=tolerate_broken_shards, remote=remote)


def sample_order(index: SampleSet, data: DataOptions, *, seed: int, global_batch_size: int) -> SampleOrder:
    """The order in which a run meets the samples of `index`."""
    weights = index.weights if isinstance(index, MixedIndex) else {"": 1.0}
    return SampleOrder(
        digest=index.digest,
        sources=[
            Source(
                name=name,
                shards=np.fromiter((entry.shard for entry in source.entries), dtype=np.int32, count=len(source)),
                num_shards=len(source.shards),
                weight=weights[name],
            )
            for name, source in sources_of(index).items()
        ],
        seed=seed,
        shuffle=data.shuffle,
        block_shards=data.shuffle_block_shards,
        global_batch_size=global_batch_size,
    )
