from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from samtrain.core.batch import IGNORE_INDEX, ImageGroups, PackedBatch
from samtrain.core.errors import BatchError

IMAGE, Q = 9, 2


def batch(**changes: Any) -> PackedBatch:
    """Two samples: `a` with two images and 7 tokens, `b` without images and 3 tokens."""
    a = [IMAGE] * (2 * Q) + [1, 5, 6]
    b = [1, 7, 8]
    labels = [IGNORE_INDEX] * 5 + [5, 6] + [IGNORE_INDEX, 7, 8]
    values: dict[str, Any] = {
        "input_ids": torch.tensor(a + b),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor([*range(7), *range(3)]),
        "cu_seqlens": torch.tensor([0, 7, 10], dtype=torch.int32),
        "pixel_values": torch.zeros(2, 3, 4, 4),
        "qformer_input_ids": torch.ones(2, 5, dtype=torch.int64),
        "qformer_attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "image_groups": ImageGroups.from_counts([2, 0]),
        "image_token_id": IMAGE,
        "num_query_tokens": Q,
        "keys": ("a", "b"),
        "num_label_tokens": 4,
    }
    return PackedBatch(**{**values, **changes})


def changed(name: str, index: int, value: int) -> dict[str, torch.Tensor]:
    tensor = getattr(batch(), name).clone()
    tensor[index] = value
    return {name: tensor}


def test_a_batch_that_keeps_its_promises_passes() -> None:
    assert batch().validate().num_images == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"a, b: labels has shape \(9,\), input_ids \(10,\)"),
        ({"position_ids": torch.zeros(11, dtype=torch.int64)}, "position_ids has shape"),
        ({"keys": ("a",)}, "1 keys but 2 samples"),
        ({"image_groups": ImageGroups.from_counts([2])}, "cu_images holds 1 samples, cu_seqlens 2"),
        ({"qformer_input_ids": torch.ones(3, 5, dtype=torch.int64)}, "3 Q-Former texts for 2 samples"),
        ({"qformer_attention_mask": torch.ones(2, 4, dtype=torch.int64)}, "differ in shape"),
        ({"cu_seqlens": torch.tensor([0, 7, 9], dtype=torch.int32)}, "cu_seqlens ends at 9, the pack has 10 tokens"),
        ({"cu_seqlens": torch.tensor([1, 7, 10], dtype=torch.int32)}, "cu_seqlens"),
        ({"pixel_values": torch.zeros(3, 3, 4, 4)}, "cu_images ends at 2, the pack has 3 images"),
        ({"cu_seqlens": torch.tensor([0, 10, 10], dtype=torch.int32)}, "b: has no tokens"),
        (changed("input_ids", 8, IMAGE), r"b: 1 image tokens in the text but 0 expected"),
        (changed("input_ids", 0, 1), r"a: 3 image tokens in the text but 4 expected \(2 images x 2 query tokens\)"),
        (changed("labels", 7, 3), "b: its first token carries a label"),
        ({"num_label_tokens": 5}, "4 labels count in the loss but num_label_tokens is 5"),
        ({"image_groups": ImageGroups.from_counts([1, 1])}, r"a: 4 image tokens .* \(1 images x 2 query tokens\)"),
    ],
)
def test_a_broken_promise_is_named_with_both_counts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        batch(**changes).validate()


@pytest.mark.parametrize("name", [f.name for f in fields(ImageGroups)])
def test_every_table_of_image_groups_is_compared(name: str) -> None:
    groups = batch().image_groups
    table = getattr(groups, name)
    for broken in (table.to(torch.float64), table.logical_not().to(table.dtype)):
        with pytest.raises(BatchError, match=r"image_groups|cu_images"):
            batch(image_groups=replace(groups, **{name: broken})).validate()


def test_borders_of_images_that_go_down_are_refused() -> None:
    groups = replace(ImageGroups.from_counts([2, 0]), cu_images=torch.tensor([0, 3, 2], dtype=torch.int32))
    with pytest.raises(BatchError, match=r"cu_images goes down: \[0, 3, 2\]"):
        batch(image_groups=groups).validate()


def test_image_groups_tell_who_shares_an_instruction() -> None:
    groups = ImageGroups.from_counts([2, 0, 3])
    assert groups.group_of_image.tolist() == [0, 0, 2, 2, 2]
    assert groups.slot_of_image.tolist() == [0, 1, 0, 1, 2]
    assert groups.valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert groups.images_of_group.tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert groups.cu_images.tolist() == [0, 2, 2, 5] and groups.cu_images.dtype == torch.int32


@pytest.mark.parametrize("counts", [[], [0], [1], [0, 0, 4], [3, 1, 0, 2]])
def test_the_tables_of_image_groups_invert_each_other(counts: list[int]) -> None:
    groups = ImageGroups.from_counts(counts)
    assert groups.valid.shape == (len(counts), max([1, *counts])) and groups.valid.sum() == sum(counts)
    back = groups.images_of_group[groups.group_of_image, groups.slot_of_image]
    assert back.tolist() == list(range(sum(counts)))


@pytest.mark.parametrize("counts", [[0], [1], [3, 1, 0, 2]])
def test_images_each_alone_have_the_tables_of_samples_of_one_image(counts: list[int]) -> None:
    alone, expected = ImageGroups.from_counts(counts).each_alone(), ImageGroups.from_counts([1] * sum(counts))
    for f in fields(ImageGroups):
        table, wanted = getattr(alone, f.name), getattr(expected, f.name)
        assert table.dtype == wanted.dtype and torch.equal(table, wanted), f.name


def test_moving_a_batch_moves_every_tensor_and_nothing_else() -> None:
    moved = batch().to("meta")
    assert moved.pixel_values.device.type == moved.labels.device.type == "meta"
    assert moved.image_groups.valid.device.type == "meta"
    assert (moved.keys, moved.num_label_tokens) == (("a", "b"), 4)


def test_a_pack_without_keys_is_the_empty_filler() -> None:
    empty = PackedBatch(
        input_ids=torch.tensor([1]),
        labels=torch.tensor([IGNORE_INDEX]),
        position_ids=torch.tensor([0]),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        pixel_values=torch.zeros(0, 3, 4, 4),
        qformer_input_ids=torch.ones(1, 1, dtype=torch.int64),
        qformer_attention_mask=torch.ones(1, 1, dtype=torch.int64),
        image_groups=ImageGroups.from_counts([0]),
        image_token_id=IMAGE,
        num_query_tokens=Q,
        keys=(),
        num_label_tokens=0,
    )
    assert empty.validate().is_empty and not batch().is_empty
