"""Choose samples to look at, by key or at random, from a folder of shards or a set of splits."""

from collections.abc import Sequence

import numpy as np

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord
from samtrain.core.seeds import derive_seed
from samtrain.data.index import ShardIndex
from samtrain.data.sheet import ShownSample, read_sample
from samtrain.data.splits import find_places
from samtrain.data.storage import Location

MAX_SHOWN = 200
_NEAR = 3


def load_indexes(path: str | Location) -> list[ShardIndex]:
    """The index of every split; shards that broke are no reason not to look at the others.

    Raises:
        DataError: no shards, or no index.
    """
    return [ShardIndex.load(place, tolerate_broken_shards=True) for place in find_places(path).values()]


def choose_keys(indexes: Sequence[ShardIndex], keys: Sequence[str]) -> list[tuple[ShardIndex, int]]:
    """The samples of these keys, in that order, from every split that has them.

    Raises:
        DataError: a key that is nowhere, with the nearest there are.
    """
    places: dict[str, list[tuple[ShardIndex, int]]] = {key: [] for key in keys}
    for index in indexes:
        for i, entry in enumerate(index.entries):
            if entry.key in places:
                places[entry.key].append((index, i))
    for key, found in places.items():
        if not found:
            near = _nearest(key, indexes)
            raise DataError(f"--key {key}: no split has this key; the nearest are {', '.join(near)}")
    return [place for found in places.values() for place in found]


def choose_random(indexes: Sequence[ShardIndex], count: int, *, seed: int) -> list[tuple[ShardIndex, int]]:
    """`count` samples over all splits, each equally likely, none twice; in the splits' order.

    Raises:
        DataError: a count that cannot be shown.
    """
    if not 1 <= count <= MAX_SHOWN:
        raise DataError(f"--random {count}: choose 1 to {MAX_SHOWN} samples")
    places = [(index, i) for index in indexes for i in range(len(index))]
    chosen = np.random.default_rng(derive_seed("show", seed)).permutation(len(places))[:count]
    return [places[i] for i in sorted(chosen)]


def shown(places: Sequence[tuple[ShardIndex, int]], *, boxes: bool) -> list[ShownSample]:
    """What a sheet draws; a sample that cannot be read is drawn as its error."""
    found = []
    for index, i in places:
        entry = index.entries[i]
        try:
            found.append(read_sample(index, i, boxes=boxes))
        except DataError as error:
            record = SampleRecord(entry.key, entry.task, f"CANNOT BE READ: {error}", "", ())
            found.append(ShownSample(record, (), f"{index.folder.name}/{index.shards[entry.shard]}"))
    return found


def _nearest(key: str, indexes: Sequence[ShardIndex]) -> list[str]:
    import difflib

    keys = [entry.key for index in indexes for entry in index.entries]
    return difflib.get_close_matches(key, keys[:20_000], n=_NEAR, cutoff=0.0)
