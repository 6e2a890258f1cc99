"""The order of samples: a pure function of (seed, epoch, shards, recipe), and a cursor into it.

The epochs follow one another without end, and a global step is the next `global_batch_size` samples of that
sequence. Ranks and workers do not appear here, so any number of them sees the same steps. The cursor is a count of
samples, so resuming costs nothing and nothing is replayed or left out.

In a mixture each source has its own endless sequence of epochs, in which every sample comes once an epoch, and the
sources are interleaved by their weights (interleave.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from samtrain.core.errors import CheckpointError
from samtrain.core.seeds import derive_seed
from samtrain.data.interleave import Interleaving

CURSOR_VERSION = 2
Shuffle = Literal["full", "shards", "none"]
_MAX_KEPT = 2  # epochs of a source: a step touches two at most, unless the set is smaller than a step


def epoch_order(seed: int, epoch: int, shards: np.ndarray, *, shuffle: Shuffle, block_shards: int) -> np.ndarray:
    """[length] int64: the indices of one epoch, each once.

    Args:
        shards: [length], the number of the shard that holds each sample.
        shuffle: `full`: all samples of the set together. `shards`: the shards are shuffled and taken `block_shards`
            at a time, and the samples of such a block are shuffled together; so a shard is read once an epoch and few
            are read at a time, and a set of no more than a block has the same order as with `full`. `none`: the order
            of the set.
    """
    if shuffle == "none":
        return np.arange(len(shards))
    order = _shuffled(derive_seed(seed, "order", epoch), len(shards))
    if shuffle == "full":
        return order
    num_shards = int(shards.max()) + 1
    place = np.empty(num_shards, dtype=np.int64)
    place[_shuffled(derive_seed(seed, "order of shards", epoch), num_shards)] = np.arange(num_shards)
    block = place[shards] // block_shards
    return order[np.argsort(block[order], kind="stable")]


def _shuffled(seed: int, length: int) -> np.ndarray:
    # Sorting the generator's raw words, not Generator.permutation: numpy keeps raw streams equal across versions only.
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


@dataclass(frozen=True)
class Slot:
    """One place of the endless sequence: sample `index` of the set, met in `epoch` of its source."""

    epoch: int
    index: int


@dataclass(frozen=True, eq=False)
class Source:
    """Samples that are shuffled among themselves.

    name: of the source in a mixture; "" where there is none.
    shards: [length] int, the shard of each sample, numbered within the source from 0 to num_shards - 1.
    weight: its share of the sequence, relative to the other sources'.
    """

    name: str
    shards: np.ndarray
    num_shards: int
    weight: float = 1.0


class SampleOrder:
    """The endless sequence over one set, or over the sources of a mixture.

    Args:
        digest: of the index, so that a cursor cannot be used on another set.
        sources: whose samples follow one another in the index.
    """

    def __init__(
        self,
        *,
        digest: str,
        sources: Sequence[Source],
        seed: int,
        shuffle: Shuffle,
        block_shards: int,
        global_batch_size: int,
    ) -> None:
        self.digest = digest
        self.sources = list(sources)
        self.seed = seed
        self.shuffle = shuffle
        self.block_shards = block_shards
        self.global_batch_size = global_batch_size
        self.length = sum(len(source.shards) for source in sources)
        self._interleaving = Interleaving([source.weight for source in sources], seed=seed)
        self._epochs = [_Epochs(source, seed, shuffle, block_shards) for source in sources]

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample was seen; the last one reaches into the next epoch where sizes do not divide.

        An epoch of a mixture is as many samples as its sources hold together; how often it meets each of them follows
        from the weights.
        """
        return -(-self.length // self.global_batch_size)

    def slots(self, position: int) -> list[Slot]:
        """The samples of the global step that starts after `position` samples."""
        chosen, turns = self._interleaving.places(position, position + self.global_batch_size)
        epochs, indices = np.empty_like(turns), np.empty_like(turns)
        first = 0
        for i, source in enumerate(self._epochs):
            mine = chosen == i
            epochs[mine], found = source.at(turns[mine])
            indices[mine] = first + found
            first += source.length
        return [Slot(epoch, index) for epoch, index in zip(epochs.tolist(), indices.tolist())]

    def times_met(self, position: int) -> np.ndarray:
        """[shards of all sources] int64: how often a sample of each shard came before `position`."""
        turns = self._interleaving.turns(position)
        return np.concatenate([source.times_met(n) for source, n in zip(self._epochs, turns)])

    def cursor(self, position: int) -> dict[str, Any]:
        """JSON-able state after `position` samples."""
        return {"version": CURSOR_VERSION, "position": position, **self._identity()}

    def position(self, cursor: dict[str, Any]) -> int:
        """The position a cursor of this very order stands at.

        Raises:
            CheckpointError: the cursor belongs to another set, seed, order or batch size; both values are named.
        """
        for name, ours in {"version": CURSOR_VERSION, **self._identity()}.items():
            if cursor.get(name) != ours:
                raise CheckpointError(
                    f"data cursor: {name} is {cursor.get(name)!r} in the checkpoint and {ours!r} now; continue with "
                    f"the set and settings the run began with, or start a new run in another output_dir"
                )
        position = cursor.get("position")
        if not isinstance(position, int) or position < 0:
            raise CheckpointError(f"data cursor: position {position!r} is not a count of samples")
        return position

    def _identity(self) -> dict[str, Any]:
        weights = zip(self.sources, self._interleaving.weights)
        return {
            "index_digest": self.digest,
            "num_samples": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shuffle_block_shards": self.block_shards if self.shuffle == "shards" else None,
            "weights": {source.name: weight for source, weight in weights},
            "global_batch_size": self.global_batch_size,
        }


class _Epochs:
    """The epochs of one source, one after another without end."""

    def __init__(self, source: Source, seed: int, shuffle: Shuffle, block_shards: int) -> None:
        self.source = source
        self.length = len(source.shards)
        # By name, not by place in the mixture: another source beside it does not change a source's own order.
        self.seed = derive_seed(seed, "source", source.name) if source.name else seed
        self.shuffle = shuffle
        self.block_shards = block_shards
        self._kept: dict[int, np.ndarray] = {}

    def at(self, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, index) of the samples that come at these turns, [n] each."""
        epochs, offsets = np.divmod(turns, self.length)
        indices = np.empty_like(turns)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            indices[mine] = self._order(epoch)[offsets[mine]]
        return epochs, indices

    def times_met(self, turns: int) -> np.ndarray:
        """[num_shards] int64: how often samples of each shard come in the first `turns`."""
        epoch, rest = divmod(turns, self.length)
        shards, count = self.source.shards, self.source.num_shards
        whole = epoch * np.bincount(shards, minlength=count)
        return whole + np.bincount(shards[self._order(epoch)[:rest]], minlength=count)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._kept:
            if len(self._kept) == _MAX_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[epoch] = epoch_order(
                self.seed, epoch, self.source.shards, shuffle=self.shuffle, block_shards=self.block_shards
            )
        return self._kept[epoch]
