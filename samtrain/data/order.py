"""The order of samples: a pure function of (seed, epoch, number of samples), and a cursor into it.

The epochs follow one another without end, and a global step is the next `global_batch_size` samples of that
sequence. Ranks and workers do not appear here, so any number of them sees the same steps. The cursor is a count of
samples, so resuming costs nothing and nothing is replayed or left out.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samtrain.core.errors import CheckpointError
from samtrain.core.seeds import derive_seed

CURSOR_VERSION = 1


def epoch_order(seed: int, epoch: int, length: int, shuffle: bool) -> np.ndarray:
    """[length] int64: the indices of one epoch, each once."""
    if not shuffle:
        return np.arange(length)
    # Sorting the generator's raw words, not Generator.permutation: numpy keeps raw streams equal across versions only.
    words = np.random.PCG64(derive_seed(seed, "order", epoch)).random_raw(length)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class Slot:
    """One place of the endless sequence: sample `index`, met in `epoch`."""

    epoch: int
    index: int


@dataclass
class SampleOrder:
    """The endless sequence over one set.

    digest: of the index, so that a cursor cannot be used on another set.
    """

    digest: str
    length: int
    seed: int
    shuffle: bool
    global_batch_size: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample was seen; the last one reaches into the next epoch where sizes do not divide."""
        return -(-self.length // self.global_batch_size)

    def slots(self, position: int) -> list[Slot]:
        """The samples of the global step that starts after `position` samples."""
        found = []
        for p in range(position, position + self.global_batch_size):
            epoch, offset = divmod(p, self.length)
            found.append(Slot(epoch, int(self._epoch(epoch)[offset])))
        return found

    def cursor(self, position: int) -> dict[str, Any]:
        """JSON-able state after `position` samples."""
        return {"version": CURSOR_VERSION, "position": position, **self._identity()}

    def position(self, cursor: dict[str, Any]) -> int:
        """The position a cursor of this very order stands at.

        Raises:
            CheckpointError: the cursor belongs to another set, seed or batch size; both values are named.
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
        return {
            "index_digest": self.digest,
            "num_samples": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "global_batch_size": self.global_batch_size,
        }

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a step touches two epochs at most, unless the set is smaller than a step
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = epoch_order(self.seed, epoch, self.length, self.shuffle)
        return self._epochs[epoch]
