import pytest
import torch

from samtrain.core.batch import IGNORE_INDEX
from samtrain.core.errors import BatchError
from samtrain.core.sample import EncodedText
from samtrain.data.collate import ReadySample, collate, empty_batch


def ready(encoder, key, instruction, num_images, output="yes no"):
    text = encoder.encode(key=key, instruction=instruction, output=output, num_images=num_images)
    return ReadySample(key, text, [torch.full((3, 32, 32), float(n)) for n in range(num_images)])


def test_a_pack_lays_samples_one_after_another(encoder):
    first, second = ready(encoder, "a", "one two three", 2), ready(encoder, "b", "one", 0)
    third = ready(encoder, "c", "", 3, output="maybe")
    batch = collate([first, second, third], encoder)
    assert batch.keys == ("a", "b", "c")
    assert batch.input_ids.tolist() == first.text.input_ids + second.text.input_ids + third.text.input_ids
    assert batch.labels.tolist() == first.text.labels + second.text.labels + third.text.labels
    lengths = [sample.text.num_tokens for sample in (first, second, third)]
    assert batch.position_ids.tolist() == [*range(lengths[0]), *range(lengths[1]), *range(lengths[2])]
    assert batch.cu_seqlens.tolist() == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert batch.cu_images.tolist() == [0, 2, 2, 5]
    assert batch.cu_seqlens.dtype == batch.cu_images.dtype == torch.int32
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.pixel_values.dtype == torch.float32
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [0, 1, 0, 1, 2]
    assert batch.num_label_tokens == 3 + 3 + 2  # words and the end mark


def test_qformer_texts_are_padded_on_the_right_and_masked(encoder):
    batch = collate([ready(encoder, "a", "one two three", 1), ready(encoder, "b", "", 1)], encoder)
    assert batch.qformer_input_ids.shape == (2, 3)
    assert batch.qformer_attention_mask.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch.qformer_input_ids[1].tolist() == [0, 0, 0]
    assert batch.qformer_input_ids.dtype == batch.qformer_attention_mask.dtype == torch.int64


def test_a_pack_without_images_has_no_pixels(encoder):
    batch = collate([ready(encoder, "a", "one", 0)], encoder)
    assert batch.pixel_values.shape == (0, 3, 32, 32)
    assert not batch.is_empty


def test_the_filler_has_one_token_no_label_and_no_image(encoder):
    for batch in (empty_batch(encoder), collate([], encoder)):
        assert batch.is_empty and batch.num_tokens == 1 and batch.num_images == 0 and batch.num_label_tokens == 0
        assert batch.labels.tolist() == [IGNORE_INDEX]
        assert batch.cu_seqlens.tolist() == [0, 1] and batch.cu_images.tolist() == [0, 0]
        assert batch.image_groups.valid.shape[0] == 1 and not batch.image_groups.valid.any()
        assert batch.input_ids.dtype == batch.qformer_input_ids.dtype == torch.int64


def test_images_that_disagree_with_the_text_are_named(encoder):
    sample = ready(encoder, "bad", "one", 2)
    with pytest.raises(BatchError, match=r"bad: 8 image tokens in the text but 4 expected"):
        collate([ReadySample("bad", sample.text, sample.images[:1])], encoder)


def test_a_label_on_the_first_token_is_refused(encoder):
    with pytest.raises(BatchError, match="bad: its first token carries a label"):
        collate([ReadySample("bad", EncodedText([1, 2], [1, 2], []), [])], encoder)
