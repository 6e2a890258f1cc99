"""From the slots of one global step to one rank's micro-batches.

Every rank reads the records of all samples of the step and encodes their text (kilobytes; exact lengths), so all
ranks compute the same packs and the same deal without talking. Then each decodes the images of its own packs only.

A sample that cannot be used is skipped, counted and named; nothing takes its place and nothing moves. A bad record
is left out before packing, by every rank alike, and reported by one of them. A bad image is found by one rank alone,
after the deal: its pack just lacks the sample, so the number of micro-batches stays equal on all ranks.

What one rank reads another may not, when a shard breaks at that moment or one node's copy is bad. So what is built here
is one rank's view of the step, which the ranks compare before it is used (agree.py).
"""

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samtrain.core.batch import PackedBatch
from samtrain.core.errors import DataError
from samtrain.core.sample import EncodedText, SampleEncoder, SampleRecord
from samtrain.data.collate import ReadySample, collate
from samtrain.data.index import ShardError
from samtrain.data.mixture import SampleSet
from samtrain.data.options import DataOptions
from samtrain.data.order import Slot
from samtrain.data.packing import Pack, SampleSize, deal
from samtrain.data.pixels import Augmentation, load_square
from samtrain.data.quarantine import Quarantine

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map`, or that of a thread pool


@dataclass(frozen=True)
class BuiltStep:
    """One rank's view of a global step.

    unusable: place in the step -> why its record or text cannot be used; it was left out before packing.
    damaged: place -> why its images cannot be decoded; of this rank's own packs.
    quarantined: shard number -> why, of the shards given up since the step before.
    sizes_digest: of keys and sizes of all samples that were packed: equal digests, equal packs.
    """

    slots: tuple[Slot, ...]
    cursor: dict[str, Any]
    micro_batches: tuple[PackedBatch, ...]
    unusable: dict[int, str] = field(default_factory=dict)
    damaged: dict[int, str] = field(default_factory=dict)
    quarantined: dict[int, str] = field(default_factory=dict)
    sizes_digest: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A sample of the step whose record and text are good. place: in the step."""

    place: int
    slot: Slot
    record: SampleRecord
    text: EncodedText

    @property
    def size(self) -> SampleSize:
        return SampleSize(self.record.key, self.text.num_tokens, len(self.record.images))


class StepBuilder:
    """Builds this rank's share of any global step; all it remembers between steps is the quarantine."""

    def __init__(
        self,
        index: SampleSet,
        encoder: SampleEncoder,
        options: DataOptions,
        *,
        seed: int,
        rank: int,
        world_size: int,
        augment: bool,
        reduced_decode: bool = False,
    ) -> None:
        self.index = index
        # A copy, because steps are built in a thread of their own and fast tokenizers refuse two threads at once.
        self.encoder = copy.deepcopy(encoder)
        self.options = options
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.augment = augment
        self.reduced_decode = reduced_decode
        self.quarantine = Quarantine(index)

    def build(
        self, slots: Sequence[Slot], *, cursor: dict[str, Any], excluded: Mapping[int, str] | None = None
    ) -> BuiltStep:
        """This rank's view of one global step; arguments and errors as of `begin`."""
        return self.begin(slots, cursor=cursor, excluded=excluded)()

    def begin(
        self,
        slots: Sequence[Slot],
        *,
        cursor: dict[str, Any],
        map_function: Map = map,
        excluded: Mapping[int, str] | None = None,
    ) -> Callable[[], BuiltStep]:
        """Read and pack one global step and have its pictures decoded; what is returned waits for them.

        Steps are begun in order and finished in order. The next may be begun before this one is finished, so that
        threads that decode do not run dry between them.

        Args:
            cursor: the state after this step, handed through.
            map_function: runs the decoding, one call per sample; that of a pool starts at once.
            excluded: place -> reason, of the samples to leave out, as the ranks agreed; None: no step of this number
                was built before, and what is in quarantine is left out.

        Raises:
            DataError: a sample exceeds the budgets. (Samples that are merely bad are left out.)
        """
        if excluded is None:
            excluded = self._in_quarantine(slots)
        broken: dict[int, str] = {}  # shards that this step finds
        prepared, unusable = self._prepare_all(slots, excluded, broken)
        sizes = [sample.size for sample in prepared]
        own = deal(
            sizes,
            max_tokens=self.options.max_tokens,
            max_images=self.options.max_images,
            world_size=self.world_size,
        )[self.rank]
        flat = [prepared[i] for chosen in own for i in chosen or ()]
        self.index.prefetch_images([sample.slot.index for sample in flat])
        decoded = iter(zip(flat, map_function(self._decode, flat)))

        def finish() -> BuiltStep:
            micro_batches, damaged = self._collate_all(own, decoded, broken)
            for shard, reason in broken.items():
                self.quarantine.add(shard, reason)
            return BuiltStep(
                slots=tuple(slots),
                cursor=cursor,
                micro_batches=tuple(micro_batches),
                unusable=unusable,
                damaged=damaged,
                quarantined=self.quarantine.take_found(),
                sizes_digest=zlib.crc32(repr(sizes).encode()),
            )

        return finish

    def _collate_all(
        self,
        own: Sequence[Pack | None],
        decoded: Iterator[tuple[_Prepared, list[Tensor] | DataError]],
        broken: dict[int, str],
    ) -> tuple[list[PackedBatch], dict[int, str]]:
        """The micro-batches of this rank, and place -> reason of the samples whose images cannot be decoded."""
        damaged: dict[int, str] = {}
        micro_batches = []
        for chosen in own:
            ready = []
            for sample, images in (next(decoded) for _ in chosen or ()):
                if isinstance(images, DataError):
                    damaged[sample.place] = str(images)
                    _note(images, broken)
                else:
                    ready.append(ReadySample(sample.record.key, sample.text, images))
            batch = collate(ready, self.encoder)
            # From pinned memory the engine's copy to a GPU waits for nobody. Asked here, not before: a process that has
            # no GPU in use (planning, a CPU run on a GPU node) must not begin to.
            micro_batches.append(batch.pin_memory() if torch.cuda.is_initialized() else batch)
        return micro_batches, damaged

    def shard_of(self, slot: Slot) -> int:
        """Number of the shard that holds the sample of a slot."""
        return self.index.entries[slot.index].shard

    def _prepare_all(
        self, slots: Sequence[Slot], excluded: Mapping[int, str], broken: dict[int, str]
    ) -> tuple[list[_Prepared], dict[int, str]]:
        """The samples to pack, and place -> reason of the others. Within a step each sample is judged by itself."""
        unusable = dict(excluded)
        prepared: list[_Prepared] = []
        tried = [(place, slot) for place, slot in enumerate(slots) if place not in excluded]
        records = self.index.read_records([slot.index for _, slot in tried])
        for (place, slot), record in zip(tried, records):
            try:
                if isinstance(record, DataError):
                    raise record
                prepared.append(_Prepared(place, slot, record, encode_checked(self.encoder, record)))
            except DataError as error:
                unusable[place] = str(error)
                _note(error, broken)
        return prepared, unusable

    def _in_quarantine(self, slots: Sequence[Slot]) -> dict[int, str]:
        """Place -> reason of the samples whose shard is given up.

        Steps are finished in order, so these shards broke in earlier ones; those that broke in one that is not finished
        yet are left out when the step is handed out (agree.py). A step that is built again does not ask: by then later
        steps were built, and what they found must not reach back.
        """
        known = set(self.quarantine.reasons)
        shards = ((place, self.shard_of(slot)) for place, slot in enumerate(slots)) if known else ()
        return {place: self.quarantine.describe(shard) for place, shard in shards if shard in known}

    def _decode(self, sample: _Prepared) -> list[Tensor] | DataError:
        """Pixel values of each image, or why the sample cannot be used."""
        try:
            return [
                self._pixels(sample, i, data)
                for i, data in enumerate(
                    self.index.read_images(sample.slot.index, sample.record, verify=self.options.verify_hashes)
                )
            ]
        except DataError as error:
            return error

    def _pixels(self, sample: _Prepared, i: int, data: bytes) -> Tensor:
        where = sample.record.images[i].file
        augmentation = None
        if self.augment:
            augmentation = Augmentation(
                horizontal_flip=self.options.horizontal_flip,
                seed=self.seed,
                epoch=sample.slot.epoch,
                key=sample.record.key,
                image_index=i,
            )
        square = load_square(
            data,
            size=self.encoder.image_size,
            augmentation=augmentation,
            reduced=self.reduced_decode,
            max_pixels=self.options.max_image_pixels,
            where=where,
        )
        return self.encoder.pixel_values(square)


def _note(error: DataError, broken: dict[int, str]) -> None:
    if isinstance(error, ShardError):
        broken.setdefault(error.shard, str(error))


def encode_checked(encoder: SampleEncoder, record: SampleRecord) -> EncodedText:
    """A record's tokens, with the promises checked that a `PackedBatch` rests on.

    Raises:
        DataError: labels or image spans disagree with the text; key and both counts are named.
    """
    text = encoder.encode(
        key=record.key, instruction=record.instruction, output=record.output, num_images=len(record.images)
    )
    if len(text.labels) != text.num_tokens:
        raise DataError(f"{record.key}: {len(text.labels)} labels for {text.num_tokens} tokens")
    found, expected = text.input_ids.count(encoder.image_token_id), len(record.images) * encoder.num_query_tokens
    if found != expected:
        raise DataError(
            f"{record.key}: {found} image tokens in the text but {expected} expected ({len(record.images)} images x "
            f"{encoder.num_query_tokens} query tokens)"
        )
    return text
