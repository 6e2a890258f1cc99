"""Samples of one pack to a checked `PackedBatch`.

Legend: T tokens in the pack, S samples, I images, Tq Q-Former text tokens, H = W = the encoder's image size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from samtrain.core.batch import IGNORE_INDEX, ImageGroups, PackedBatch
from samtrain.core.sample import EncodedText, SampleEncoder


@dataclass(frozen=True)
class ReadySample:
    """A sample with its text encoded and its images decoded (each [3, H, W] float32)."""

    key: str
    text: EncodedText
    images: list[Tensor]


def collate(samples: Sequence[ReadySample], encoder: SampleEncoder) -> PackedBatch:
    """Join samples to one pack; no samples make the filler, `empty_batch`.

    Raises:
        BatchError: text and images of a sample disagree.
    """
    if not samples:
        return empty_batch(encoder)
    counts = [len(sample.images) for sample in samples]
    images = list(chain.from_iterable(sample.images for sample in samples))
    pixel_values = torch.stack(images) if images else _no_pixels(encoder)  # [I, 3, H, W]
    longest = max(1, *(len(sample.text.qformer_input_ids) for sample in samples))
    qformer_input_ids = torch.full((len(samples), longest), encoder.qformer_pad_token_id)  # [S, Tq]
    qformer_attention_mask = torch.zeros_like(qformer_input_ids)
    for s, sample in enumerate(samples):
        tokens = sample.text.qformer_input_ids
        qformer_input_ids[s, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        qformer_attention_mask[s, : len(tokens)] = 1
    labels = list(chain.from_iterable(sample.text.labels for sample in samples))
    return PackedBatch(
        input_ids=_int64(chain.from_iterable(sample.text.input_ids for sample in samples)),
        labels=torch.tensor(labels, dtype=torch.int64),
        position_ids=_int64(chain.from_iterable(range(sample.text.num_tokens) for sample in samples)),
        cu_seqlens=_borders(sample.text.num_tokens for sample in samples),
        pixel_values=pixel_values,
        qformer_input_ids=qformer_input_ids,
        qformer_attention_mask=qformer_attention_mask,
        image_groups=ImageGroups.from_counts(counts),
        image_token_id=encoder.image_token_id,
        num_query_tokens=encoder.num_query_tokens,
        keys=tuple(sample.key for sample in samples),
        num_label_tokens=len(labels) - labels.count(IGNORE_INDEX),
    ).validate()


def empty_batch(encoder: SampleEncoder) -> PackedBatch:
    """The filler: one pad token without a label, one group of no images. It adds exactly nothing to the loss."""
    return PackedBatch(
        input_ids=torch.tensor([encoder.pad_token_id]),
        labels=torch.tensor([IGNORE_INDEX]),
        position_ids=torch.tensor([0]),
        cu_seqlens=_borders([1]),
        pixel_values=_no_pixels(encoder),
        # One visible token: a row without any would be a softmax over nothing in some attentions.
        qformer_input_ids=torch.tensor([[encoder.qformer_pad_token_id]]),
        qformer_attention_mask=torch.ones(1, 1, dtype=torch.int64),
        image_groups=ImageGroups.from_counts([0]),
        image_token_id=encoder.image_token_id,
        num_query_tokens=encoder.num_query_tokens,
        keys=(),
        num_label_tokens=0,
    ).validate()


def _no_pixels(encoder: SampleEncoder) -> Tensor:
    return torch.empty(0, 3, encoder.image_size, encoder.image_size)


def _int64(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _borders(lengths: Iterable[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
