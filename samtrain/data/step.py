"""From the slots of one global step to one rank's micro-batches.

Every rank reads the records of all samples of the step and encodes their text (kilobytes; exact lengths), so all
ranks compute the same packs and the same deal without talking. Then each decodes the images of its own packs only.

A sample that cannot be used is skipped, counted and named; nothing takes its place and nothing moves. A bad record
is left out before packing, by every rank alike, and reported by one of them. A bad image is found by one rank alone,
after the deal: its pack just lacks the sample, so the number of micro-batches stays equal on all ranks.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from samtrain.core.batch import GlobalStep
from samtrain.core.errors import DataError
from samtrain.core.sample import EncodedText, SampleEncoder, SampleRecord
from samtrain.data.collate import ReadySample, collate
from samtrain.data.decode import augment_image, decode_image
from samtrain.data.index import ShardIndex
from samtrain.data.options import DataOptions
from samtrain.data.order import Slot
from samtrain.data.packing import SampleSize, deal, pack

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map`, or that of a thread pool


@dataclass(frozen=True)
class _Prepared:
    """A sample of the step whose record and text are good."""

    slot: Slot
    record: SampleRecord
    text: EncodedText

    @property
    def size(self) -> SampleSize:
        return SampleSize(self.record.key, self.text.num_tokens, len(self.record.images))


class StepBuilder:
    """Builds this rank's share of any global step; holds no state between steps."""

    def __init__(
        self,
        index: ShardIndex,
        encoder: SampleEncoder,
        options: DataOptions,
        *,
        seed: int,
        rank: int,
        world_size: int,
        augment: bool,
    ) -> None:
        self.index = index
        # A copy, because steps are built in a thread of their own and fast tokenizers refuse two threads at once.
        self.encoder = copy.deepcopy(encoder)
        self.options = options
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.augment = augment

    def build(self, slots: Sequence[Slot], *, cursor: dict[str, Any], map_function: Map = map) -> GlobalStep:
        """One global step.

        Args:
            cursor: the state after this step, handed through.
            map_function: runs the decoding, one call per sample.

        Raises:
            DataError: a sample exceeds the budgets. (Samples that are merely bad are skipped.)
        """
        skipped: dict[str, str] = {}
        prepared: list[_Prepared] = []
        for i, slot in enumerate(slots):
            try:
                prepared.append(self._prepare(slot))
            except DataError as error:
                if i % self.world_size == self.rank:  # all ranks see it, one reports it
                    skipped[self.index.entries[slot.index].key] = str(error)
        sizes = [sample.size for sample in prepared]
        packs = pack(sizes, max_tokens=self.options.max_tokens, max_images=self.options.max_images)
        own = deal(packs, sizes, world_size=self.world_size)[self.rank]
        flat = [prepared[i] for chosen in own for i in chosen or ()]
        decoded = iter(zip(flat, map_function(self._decode, flat)))
        micro_batches = []
        for chosen in own:
            ready = []
            for sample, images in (next(decoded) for _ in chosen or ()):
                if isinstance(images, DataError):
                    skipped[sample.record.key] = str(images)
                else:
                    ready.append(ReadySample(sample.record.key, sample.text, images))
            micro_batches.append(collate(ready, self.encoder))
        keys = tuple(self.index.entries[slot.index].key for slot in slots)
        return GlobalStep(tuple(micro_batches), cursor, keys, skipped)

    def _prepare(self, slot: Slot) -> _Prepared:
        record = self.index.read_record(slot.index)
        return _Prepared(slot, record, encode_checked(self.encoder, record))

    def _decode(self, sample: _Prepared) -> list[Tensor] | DataError:
        """Pixel values of each image, or why the sample cannot be used."""
        try:
            return [
                self._pixels(sample, i, data)
                for i, data in enumerate(self.index.read_images(sample.slot.index, sample.record))
            ]
        except DataError as error:
            return error

    def _pixels(self, sample: _Prepared, i: int, data: bytes) -> Tensor:
        where = sample.record.images[i].file
        image = decode_image(data, max_pixels=self.options.max_image_pixels, where=where)
        if self.augment:
            image = augment_image(
                image,
                size=self.encoder.image_size,
                horizontal_flip=self.options.horizontal_flip,
                seed=self.seed,
                epoch=sample.slot.epoch,
                key=sample.record.key,
                image_index=i,
            )
        return self.encoder.pixel_values(image)


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
