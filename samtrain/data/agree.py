"""The ranks agree on a step before any of them uses it.

Packs follow from the samples that every rank can read, and all ranks must make the same packs: under ZeRO-3 another
number of micro-batches is a hang, and another deal loses samples. As long as every rank reads the same bytes this costs
one small message between the hosts. Where one finds a sample unusable, all leave it out, and those who had packed it
build the step again. Everything here is decided from what all ranks have gathered, so all decide alike.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from samtrain.core.batch import IN_QUARANTINE, GlobalStep
from samtrain.core.distributed import all_gather_int_on_hosts, all_gather_on_hosts
from samtrain.core.errors import CheckpointError, TrainingError
from samtrain.core.log import logger
from samtrain.data.mixture import folders_of, sources_of
from samtrain.data.order import Slot
from samtrain.data.quarantine import Quarantine
from samtrain.data.step import BuiltStep, StepBuilder

Rebuild = Callable[[BuiltStep, Mapping[int, str]], BuiltStep]  # (step, places to leave out) -> step
MIN_BAD = 8  # bad samples, and more than half of those tried, before a shard that can be read is given up
MIN_SEEN = 100  # a share of fewer samples than this says little
_EXAMPLES = 5
_NOT_CLEAN = -1  # no digest is negative
_ROUNDING = 1e-6


@dataclass(frozen=True)
class AgreedStep:
    """A step as all ranks know it.

    own: this rank's part, built of the samples that every rank can use.
    bad: place in the step -> why it is skipped, of all ranks. (A skip that is found by several is one skip.)
    quarantined: shard number -> why, of the shards newly given up by any rank.
    """

    own: BuiltStep
    bad: dict[int, str]
    quarantined: dict[int, str]


def agree(built: BuiltStep, rebuild: Rebuild) -> AgreedStep:
    """Compare this rank's view with the others'; to be called by all ranks, once for every step.

    Raises:
        TrainingError: on all ranks, where they read different texts for the same samples.
    """
    # As a rule nothing is wrong and all read the same: one number of each tells.
    is_clean = not (built.unusable or built.damaged or built.quarantined)
    told = all_gather_int_on_hosts(built.sizes_digest if is_clean else _NOT_CLEAN)
    if _NOT_CLEAN not in told and len(set(told)) == 1:
        return AgreedStep(built, {}, {})
    quarantined: dict[int, str] = {}
    while True:
        without_tensors = replace(built, slots=(), cursor={}, micro_batches=())
        views: list[BuiltStep] = all_gather_on_hosts(without_tensors)
        unusable: dict[int, str] = {}
        for view in views:
            unusable = view.unusable | unusable
            quarantined = view.quarantined | quarantined
        if all(view.unusable.keys() == unusable.keys() for view in views):
            break
        if built.unusable.keys() != unusable.keys():
            built = rebuild(built, unusable)
    digests = [view.sizes_digest for view in views]
    if len(set(digests)) > 1:
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise TrainingError(
            f"texts or their tokens differ between the ranks: ranks {odd} do not read what rank 0 reads; the shards "
            f"or the tokenizer on their nodes are others: copy them again"
        )
    bad = dict(unusable)
    for view in views:
        bad |= view.damaged
    return AgreedStep(built, dict(sorted(bad.items())), quarantined)


class StepAccounts:
    """Turns agreed steps into `GlobalStep`s, logs what is skipped, and stops the run when it is too much.

    What it knows follows from the steps alone, not from ranks, workers or how far ahead they were built, and is saved
    with the cursor: a resumed run gives up a shard after the same step.

    Args:
        max_bad_fraction: None: never stop.
    """

    def __init__(self, builder: StepBuilder, *, max_bad_fraction: float | None) -> None:
        self.builder = builder
        self.max_bad_fraction = max_bad_fraction
        self._num_seen = 0
        self._bad: dict[str, str] = {}  # some of them: key -> reason
        self._quarantined: dict[int, str] = {}  # agreed by all ranks
        self._tried: Counter[int] = Counter()  # shard -> samples met
        self._bad_of_shard: Counter[int] = Counter()

    def state(self) -> dict[str, Any]:
        """JSON-able; what was seen and tried follows from the position."""
        names = self.builder.index.shards
        return {
            "of_shard": {names[shard]: count for shard, count in sorted(self._bad_of_shard.items())},
            "quarantined": {names[shard]: reason for shard, reason in self._quarantined.items()},
        }

    def load_state(self, state: Any, *, num_seen: int, tried: np.ndarray, retry_quarantined: bool) -> None:
        """Continue where `state` was taken.

        Args:
            num_seen: samples met before. tried: [shards], of each shard.
            retry_quarantined: read shards again that were given up.

        Raises:
            CheckpointError: it is not such a state.
        """
        numbers = {name: shard for shard, name in enumerate(self.builder.index.shards)}
        try:
            self._bad_of_shard = Counter({numbers[name]: int(count) for name, count in state["of_shard"].items()})
            self._quarantined = {numbers[name]: str(reason) for name, reason in state["quarantined"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"data cursor: its account of bad samples cannot be read ({error!r})") from None
        self._num_seen = num_seen
        self._tried = Counter(dict(enumerate(tried.tolist())))
        self._bad = {}
        if retry_quarantined:
            for shard in self._quarantined:
                del self._tried[shard], self._bad_of_shard[shard]
            self._quarantined = {}
        self.builder.quarantine = Quarantine(self.builder.index)
        self.builder.quarantine.take_over(self._quarantined)
        if self.builder.rank == 0:
            for shard, reason in self._quarantined.items():
                logger.warning(
                    "shard %s stays in quarantine (data.retry_quarantined reads it again): %s",
                    self.builder.index.shards[shard],
                    reason,
                )

    def left_out(self, built: BuiltStep) -> dict[int, str]:
        """Place -> reason of samples that a step which was built ahead still has, and that no rank may use any more."""
        if not self._quarantined:
            return {}
        shards = ((place, self.builder.shard_of(slot)) for place, slot in enumerate(built.slots))
        return {
            place: self.builder.quarantine.describe(shard)
            for place, shard in shards
            if shard in self._quarantined and place not in built.unusable
        }

    def close(self, step: AgreedStep) -> GlobalStep:
        """What is handed out.

        Raises:
            TrainingError: on all ranks, when more than `max_bad_fraction` of the samples could not be used.
        """
        index, own = self.builder.index, step.own
        found = {shard: why for shard, why in step.quarantined.items() if shard not in self._quarantined}
        self._quarantined |= found
        garbage = self._garbage(step)
        self._quarantined |= garbage
        found |= garbage
        self.builder.quarantine.take_over(found)
        keys = tuple(index.entries[slot.index].key for slot in own.slots)
        self._num_seen += len(keys)
        self._keep_examples(step, keys)
        rank, world_size = self.builder.rank, self.builder.world_size
        # A record that all ranks left out is reported by one of them; a damaged image by the one that met it.
        mine = {i: why for i, why in own.unusable.items() if i % world_size == rank} | own.damaged
        skipped = {keys[i]: self._reason(own.slots[i], why) for i, why in sorted(mine.items())}
        self._log(found, skipped)
        self._check()
        names = {index.shards[shard]: why for shard, why in found.items()}
        return GlobalStep(own.micro_batches, own.cursor | {"bad": self.state()}, keys, skipped, names)

    def _garbage(self, step: AgreedStep) -> dict[int, str]:
        """Shards that can be read, and mostly hold samples that cannot be used."""
        shards = [self.builder.shard_of(slot) for slot in step.own.slots]
        self._tried.update(shards)
        bad = Counter(shards[place] for place in step.bad if shards[place] not in self._quarantined)
        self._bad_of_shard.update(bad)
        return {
            shard: f"{self._bad_of_shard[shard]} of the {self._tried[shard]} samples tried are bad"
            for shard in bad
            if self._bad_of_shard[shard] >= MIN_BAD and 2 * self._bad_of_shard[shard] > self._tried[shard]
        }

    def _reason(self, slot: Slot, reason: str) -> str:
        """Why a sample is skipped; what is wrong with its shard is said once, where the shard is named."""
        shard = self.builder.shard_of(slot)
        return self.builder.quarantine.describe(shard) if shard in self._quarantined else reason

    @property
    def _num_bad(self) -> int:
        """Single bad samples met; those of a shard in quarantine count by its share."""
        return sum(count for shard, count in self._bad_of_shard.items() if shard not in self._quarantined)

    def _keep_examples(self, step: AgreedStep, keys: tuple[str, ...]) -> None:
        for place, reason in step.bad.items():
            if self.builder.shard_of(step.own.slots[place]) not in self._quarantined and len(self._bad) < _EXAMPLES:
                self._bad[keys[place]] = reason

    def _log(self, found: Mapping[int, str], skipped: Mapping[str, str]) -> None:
        if self.builder.rank == 0:
            for shard, reason in found.items():
                logger.warning(
                    "shard %s is quarantined, its %d samples count as bad and are skipped: %s",
                    self.builder.index.shards[shard],
                    self.builder.quarantine.samples_of_shard[shard],
                    reason,
                )
        for key, reason in skipped.items():
            if not reason.startswith(IN_QUARANTINE):
                logger.warning("sample %s is skipped: %s", key, reason)

    def _check(self) -> None:
        """Stop when the single bad samples seen and the quarantined share of the set are more than allowed."""
        if self.max_bad_fraction is None:
            return
        index = self.builder.index
        quarantine = self.builder.quarantine
        lost = sum(quarantine.samples_of_shard[shard] for shard in self._quarantined)
        share = sum(quarantine.share_of_shard[shard] for shard in self._quarantined)
        left = self.max_bad_fraction - share
        if left >= -_ROUNDING and self._num_bad < left * max(self._num_seen, MIN_SEEN) + 1 - _ROUNDING:
            return
        parts: list[str] = []
        some: list[str] = []
        if self._num_bad:
            parts.append(f"{self._num_bad} of the {self._num_seen} samples seen so far could not be used")
            some += self._bad.values()
        if lost:
            count = len(self._quarantined)
            by_weight = f"{100 * share:.1f} %{' by weight' if len(sources_of(index)) > 1 else ''}"
            parts.append(f"{lost} of {len(index)} samples ({by_weight}) are in {count} quarantined shards")
            some += list(self._quarantined.values())[:_EXAMPLES]
        lint = ", ".join(f"`samtrain data lint {folder} --fix OUT`" for folder in folders_of(index))
        raise TrainingError(
            f"{', and '.join(parts)}: more than data.max_bad_fraction = {self.max_bad_fraction} allows. "
            f"{'; '.join(some)}. Mend or remove them: {lint} writes a clean set"
        )
