"""The ranks agree on a step before any of them uses it.

Packs follow from the samples that every rank can read, and all ranks must make the same packs: under ZeRO-3 another
number of micro-batches is a hang, and another deal loses samples. As long as every rank reads the same bytes this costs
one small message between the hosts. Where one finds a sample unusable, all leave it out, and those who had packed it
build the step again. Everything here is decided from what all ranks have gathered, so all decide alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from samtrain.core.batch import IN_QUARANTINE, GlobalStep
from samtrain.core.distributed import all_gather_int_on_hosts, all_gather_on_hosts
from samtrain.core.errors import TrainingError
from samtrain.core.log import logger
from samtrain.data.order import Slot
from samtrain.data.step import BuiltStep, StepBuilder

Rebuild = Callable[[BuiltStep, Mapping[int, str]], BuiltStep]  # (step, places to leave out) -> step
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

    Args:
        max_bad_fraction: None: never stop.
    """

    def __init__(self, builder: StepBuilder, *, max_bad_fraction: float | None) -> None:
        self.builder = builder
        self.max_bad_fraction = max_bad_fraction
        self._num_seen = 0
        self._num_bad = 0
        self._bad: dict[str, str] = {}  # some of them: key -> reason
        self._quarantined: dict[int, str] = {}  # agreed by all ranks

    def close(self, step: AgreedStep) -> GlobalStep:
        """What is handed out.

        Raises:
            TrainingError: on all ranks, when more than `max_bad_fraction` of the samples could not be used.
        """
        index, own = self.builder.index, step.own
        found = {shard: why for shard, why in step.quarantined.items() if shard not in self._quarantined}
        self._quarantined |= found
        self.builder.quarantine.take_over(found)
        keys = tuple(index.entries[slot.index].key for slot in own.slots)
        self._count(step, keys)
        rank, world_size = self.builder.rank, self.builder.world_size
        # A record that all ranks left out is reported by one of them; a damaged image by the one that met it.
        mine = {i: why for i, why in own.unusable.items() if i % world_size == rank} | own.damaged
        skipped = {keys[i]: self._reason(own.slots[i], why) for i, why in sorted(mine.items())}
        self._log(found, skipped)
        self._check()
        names = {index.shards[shard]: why for shard, why in found.items()}
        return GlobalStep(own.micro_batches, own.cursor, keys, skipped, names)

    def _reason(self, slot: Slot, reason: str) -> str:
        """Why a sample is skipped; what is wrong with its shard is said once, where the shard is named."""
        shard = self.builder.shard_of(slot)
        return self.builder.quarantine.describe(shard) if shard in self._quarantined else reason

    def _count(self, step: AgreedStep, keys: tuple[str, ...]) -> None:
        self._num_seen += len(keys)
        for place, reason in step.bad.items():
            if self.builder.shard_of(step.own.slots[place]) not in self._quarantined:
                self._num_bad += 1
                if len(self._bad) < _EXAMPLES:
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
        lost = sum(self.builder.quarantine.samples_of_shard[shard] for shard in self._quarantined)
        share = lost / len(index)
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
            parts.append(f"{lost} of {len(index)} samples ({100 * share:.1f} %) are in {count} quarantined shards")
            some += list(self._quarantined.values())[:_EXAMPLES]
        raise TrainingError(
            f"{', and '.join(parts)}: more than data.max_bad_fraction = {self.max_bad_fraction} allows. "
            f"{'; '.join(some)}. Mend or remove them: `samtrain data lint {index.folder} --fix OUT` writes a clean set"
        )
