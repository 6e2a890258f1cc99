"""The contract between data, model and engine: a packed batch of multi-image samples.

Legend: T tokens in the pack, S samples in the pack, I images in the pack, N images of one sample,
Q query tokens per image, Tq Q-Former text tokens (padded on the right), H, W pixels.

A pack holds whole samples one after another. `cu_seqlens` marks their token borders, `cu_images` (of its image
groups) their image borders: sample s owns tokens cu_seqlens[s]:cu_seqlens[s+1] and images cu_images[s]:cu_images[s+1].
Labels are aligned with the inputs (Hugging Face convention: the model shifts); the first token of every
sample carries IGNORE_INDEX, so shifting never crosses a border.
"""

from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from samtrain.core.errors import BatchError

IGNORE_INDEX = -100
IN_QUARANTINE = "in quarantine: "  # begins the reason of samples that are skipped because of their shard


@dataclass(frozen=True)
class ImageGroups:
    """Who shares an instruction with whom, as index tables built on the host (launch tables of the kernels).

    group_of_image: [I] int64, the sample an image belongs to.
    slot_of_image:  [I] int64, its place 0..N-1 within the sample.
    images_of_group: [S, Nmax] int64, the images of each sample; 0 where `valid` is False.
    valid:          [S, Nmax] bool.
    cu_images:      [S+1] int32, the first image of each sample, and I.
    """

    group_of_image: Tensor
    slot_of_image: Tensor
    images_of_group: Tensor
    valid: Tensor
    cu_images: Tensor

    @staticmethod
    def from_counts(counts: list[int]) -> "ImageGroups":
        """Tables for samples with `counts[s]` images each (0 is allowed), on the CPU."""
        num_groups, largest = len(counts), max([1, *counts])
        n = torch.tensor(counts, dtype=torch.int64)
        starts = torch.cumsum(n, 0) - n
        slots = torch.arange(largest)
        valid = slots[None, :] < n[:, None]
        images = torch.where(valid, starts[:, None] + slots[None, :], 0)
        group_of_image = torch.repeat_interleave(torch.arange(num_groups), n)
        slot_of_image = torch.arange(int(n.sum())) - starts[group_of_image]
        cu_images = torch.nn.functional.pad(torch.cumsum(n, 0), (1, 0)).to(torch.int32)
        return ImageGroups(group_of_image, slot_of_image, images, valid, cu_images)

    @staticmethod
    def of_one_image(num_groups: int, *, device: torch.device) -> "ImageGroups":
        """Tables of a single image, the first sample's; made on `device`, so that no copy waits for it."""
        sample = torch.arange(num_groups + 1, device=device)
        none = torch.zeros(1, dtype=torch.int64, device=device)
        return ImageGroups(
            group_of_image=none,
            slot_of_image=none,
            images_of_group=torch.zeros_like(sample[1:, None]),
            valid=sample[:-1, None] == 0,
            cu_images=(sample > 0).to(torch.int32),
        )

    def each_alone(self) -> "ImageGroups":
        """Tables of the same images, each a sample of its own; made on their device, so that no copy waits for it."""
        border = torch.arange(self.group_of_image.shape[0] + 1, device=self.group_of_image.device)
        image = border[:-1]
        return ImageGroups(
            group_of_image=image,
            slot_of_image=torch.zeros_like(image),
            images_of_group=image[:, None],
            valid=torch.ones_like(image[:, None], dtype=torch.bool),
            cu_images=border.to(torch.int32),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ImageGroups":
        return ImageGroups(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> "ImageGroups":
        return ImageGroups(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank: whole samples, isolated from each other.

    input_ids, labels, position_ids: [T] int64 (position_ids restart at 0 with every sample).
    cu_seqlens: [S+1] int32, the first token of each sample, and T.
    pixel_values: [I, 3, H, W] float32, normalised; I may be 0 (the model then adds its zero-weighted dummy).
    qformer_input_ids, qformer_attention_mask: [S, Tq] int64.
    image_groups: the index tables of the I images, their borders `cu_images` among them.
    image_token_id, num_query_tokens: how image spans are written in input_ids.
    keys: the S sample keys, in pack order. An empty pack (see `is_empty`) has none.
    num_label_tokens: number of labels that count in the loss.
    max_seqlen: tokens of the longest sample; follows from cu_seqlens where the batch is made.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    pixel_values: Tensor
    qformer_input_ids: Tensor
    qformer_attention_mask: Tensor
    image_groups: ImageGroups
    image_token_id: int
    num_query_tokens: int
    keys: tuple[str, ...]
    num_label_tokens: int
    max_seqlen: int = 0

    def __post_init__(self) -> None:
        if self.max_seqlen == 0:  # later copies, on a device, are told
            lengths = (b - a for a, b in pairwise(self.cu_seqlens.tolist()))
            object.__setattr__(self, "max_seqlen", max(lengths, default=0))

    @property
    def is_empty(self) -> bool:
        """True for the filler a rank runs when a step has fewer packs than ranks: one token, no label, no image."""
        return not self.keys

    @property
    def cu_images(self) -> Tensor:
        return self.image_groups.cu_images

    @property
    def num_images(self) -> int:
        return self.pixel_values.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        return self._map(lambda x: x.pin_memory())

    def _map(self, function: Any) -> "PackedBatch":
        changed = {
            f.name: function(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), (Tensor, ImageGroups))
        }
        return replace(self, **changed)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of `SamMllmForConditionalGeneration.forward` for a packed batch."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "num_label_tokens": self.num_label_tokens,
            "pixel_values": self.pixel_values,
            "image_groups": self.image_groups,
            "qformer_input_ids": self.qformer_input_ids,
            "qformer_attention_mask": self.qformer_attention_mask,
        }

    def validate(self) -> "PackedBatch":
        """Check every promise of this class on the host, once, where the batch is made.

        Raises:
            BatchError: naming the sample's key and both counts that disagree.
        """
        num_tokens, num_samples = self.num_tokens, len(self.cu_seqlens) - 1
        who = ", ".join(self.keys) or "(empty pack)"
        for name in ("labels", "position_ids"):
            if getattr(self, name).shape != (num_tokens,):
                raise BatchError(
                    f"{who}: {name} has shape {tuple(getattr(self, name).shape)}, input_ids ({num_tokens},)"
                )
        if not self.is_empty and len(self.keys) != num_samples:
            raise BatchError(f"{who}: {len(self.keys)} keys but {num_samples} samples in cu_seqlens")
        if len(self.cu_images) != num_samples + 1:
            raise BatchError(f"{who}: cu_images holds {len(self.cu_images) - 1} samples, cu_seqlens {num_samples}")
        if self.qformer_input_ids.shape[0] != num_samples:
            raise BatchError(f"{who}: {self.qformer_input_ids.shape[0]} Q-Former texts for {num_samples} samples")
        if self.qformer_input_ids.shape != self.qformer_attention_mask.shape:
            raise BatchError(f"{who}: qformer_attention_mask and qformer_input_ids differ in shape")
        token_borders, image_borders = self.cu_seqlens.tolist(), self.cu_images.tolist()
        if token_borders[0] != 0 or token_borders[-1] != num_tokens:
            raise BatchError(f"{who}: cu_seqlens ends at {token_borders[-1]}, the pack has {num_tokens} tokens")
        if image_borders[0] != 0 or image_borders[-1] != self.num_images:
            raise BatchError(f"{who}: cu_images ends at {image_borders[-1]}, the pack has {self.num_images} images")
        if image_borders != sorted(image_borders):
            raise BatchError(f"{who}: cu_images goes down: {image_borders}")
        is_image = (self.input_ids == self.image_token_id).tolist()
        for s in range(num_samples):
            key = self.keys[s] if self.keys else "(empty pack)"
            start, stop = token_borders[s], token_borders[s + 1]
            if stop <= start:
                raise BatchError(f"{key}: has no tokens")
            found = sum(is_image[start:stop])
            places = (image_borders[s + 1] - image_borders[s]) * self.num_query_tokens
            if found != places:
                raise BatchError(
                    f"{key}: {found} image tokens in the text but {places} expected "
                    f"({image_borders[s + 1] - image_borders[s]} images x {self.num_query_tokens} query tokens)"
                )
            if int(self.labels[start]) != IGNORE_INDEX:
                raise BatchError(f"{key}: its first token carries a label; shifting would cross the sample's border")
        counted = int((self.labels != IGNORE_INDEX).sum())
        if counted != self.num_label_tokens:
            raise BatchError(
                f"{who}: {counted} labels count in the loss but num_label_tokens is {self.num_label_tokens}"
            )
        counts = [b - a for a, b in pairwise(image_borders)]
        expected_groups = ImageGroups.from_counts(counts)
        for f in fields(ImageGroups):
            table, expected = getattr(self.image_groups, f.name), getattr(expected_groups, f.name)
            if table.dtype != expected.dtype or not torch.equal(table, expected):
                raise BatchError(f"{who}: image_groups.{f.name} does not agree with its cu_images {image_borders}")
        return self


@dataclass(frozen=True)
class GlobalStep:
    """One rank's share of one optimizer step.

    micro_batches: as many on every rank (fillers where packs ran out), so that all ranks make the same calls.
    cursor: JSON-able state of the data order *after* this step; what a checkpoint of this step stores.
    keys: the keys of the whole step over all ranks, in order.
    skipped: key -> reason, of the samples of this step that this rank could not use.
    quarantined: shard -> reason, of the shards that no rank reads any more; each in one step, the same on all ranks.
    """

    micro_batches: tuple[PackedBatch, ...]
    cursor: dict[str, Any]
    keys: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
