"""Prompts, spans, labels and pixels, with word-level tokenizers whose ids can be read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from samtrain.core.batch import IGNORE_INDEX
from samtrain.core.errors import ConfigError, DataError
from samtrain.model import SamMllmProcessor


def words(processor: SamMllmProcessor, ids: list[int]) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids)


def test_prefix_layout_is_images_then_bos_then_text_and_labels_cover_answer_and_eos(make_processor: Any) -> None:
    processor = make_processor()
    text = processor.encode(key="k", instruction="what is in every picture ?", output="a cat .", num_images=2)
    prompt = ["<image>"] * 6 + ["<s>", "what", "is", "in", "every", "picture", "?"]
    assert words(processor, text.input_ids) == [*prompt, "a", "cat", ".", "</s>"]
    assert text.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert text.labels[len(prompt) :] == text.input_ids[len(prompt) :]


def test_interleaved_layout_puts_each_span_at_its_placeholder(make_processor: Any) -> None:
    processor = make_processor(image_layout="interleaved", num_query_tokens=2)
    text = processor.encode(key="k", instruction="a <image> cat <image>?", output=None, num_images=2)
    image = ["<image>"] * 2
    assert words(processor, text.input_ids) == ["<s>", "a", *image, "cat", *image, "?"]
    assert set(text.labels) == {IGNORE_INDEX}


@pytest.mark.parametrize("layout", ["prefix", "interleaved"])
def test_a_long_instruction_is_cut_on_the_left_and_spans_never(make_processor: Any, layout: str) -> None:
    processor = make_processor(image_layout=layout, max_instruction_tokens=4, num_query_tokens=2)
    instruction = "the dog is <image> in the <image> top left ?"
    text = words(processor, processor.encode(key="k", instruction=instruction, output=None, num_images=2).input_ids)
    assert text.count("<image>") == 4
    assert [w for w in text if w != "<image>"] == ["<s>", "top", "left", "?"]


def test_a_long_answer_is_cut_on_the_right_with_its_eos(make_processor: Any) -> None:
    processor = make_processor(max_output_tokens=3)
    text = processor.encode(key="k", instruction="what ?", output="a cat is in every picture", num_images=0)
    assert words(processor, [i for i in text.labels if i != IGNORE_INDEX]) == ["a", "cat", "is"]


def test_the_qformer_reads_the_end_of_the_instruction_without_placeholders(make_processor: Any) -> None:
    processor = make_processor(image_layout="interleaved", max_text_tokens=5)
    text = processor.encode(key="k", instruction="a <image> dog is in the picture ?", output=None, num_images=1)
    tokens = processor.qformer_tokenizer.convert_ids_to_tokens(text.qformer_input_ids)
    assert tokens == ["[CLS]", "the", "picture", "?", "[SEP]"]


def test_prefix_layout_drops_placeholders_from_the_text(make_processor: Any) -> None:
    processor = make_processor(num_query_tokens=1)
    text = processor.encode(key="k", instruction="<image> cat <image> dog", output=None, num_images=2)
    assert words(processor, text.input_ids) == ["<image>", "<image>", "<s>", "cat", "dog"]


@pytest.mark.parametrize(
    ("layout", "instruction", "output", "message"),
    [
        ("interleaved", "<image> what ?", "no", "sample-7: the instruction has 1 <image> placeholders .* 2 images"),
        ("interleaved", "what ?", "no", "sample-7: the instruction has 0 <image> placeholders .* 2 images"),
        ("prefix", "<image> what ?", "no", "sample-7: the instruction has 1 .* 2 images.*or none"),
        ("prefix", "what ?", "a <image>", "sample-7: the answer holds <image>"),
    ],
)
def test_disagreeing_placeholders_are_errors_that_name_the_key(
    make_processor: Any, layout: str, instruction: str, output: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_processor(image_layout=layout).encode(key="sample-7", instruction=instruction, output=output, num_images=2)


def test_pixels_equal_a_bicubic_resize_scaled_and_normalised(make_processor: Any) -> None:
    processor = make_processor()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 13, 4), dtype=np.uint8), "RGBA")
    got = processor.pixel_values(image)
    small = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = (small - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    assert got.shape == (3, 8, 8) and got.dtype == torch.float32
    assert np.abs(got.permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_pixels_equal_those_of_the_saved_image_processor(make_processor: Any) -> None:
    processor = make_processor()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    theirs = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert (processor.pixel_values(image) - theirs).abs().max() < 1e-6


def test_pixels_of_a_tensor_are_those_of_the_picture(make_processor: Any) -> None:
    processor = make_processor()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    from_tensor = processor.pixel_values(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    assert from_tensor.is_contiguous() and torch.equal(from_tensor, processor.pixel_values(Image.fromarray(pixels)))


def test_a_saved_processor_loads_through_auto_processor_and_encodes_alike(make_processor: Any, tmp_path: Path) -> None:
    processor = make_processor(
        image_layout="interleaved", max_instruction_tokens=7, max_output_tokens=4, max_text_tokens=6
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SamMllmProcessor and loaded.image_token_id == processor.image_token_id
    sample = {"key": "k", "instruction": "a cat is <image> in the picture ?", "output": "yes a cat is", "num_images": 1}
    assert loaded.encode(**sample) == processor.encode(**sample)
    image = Image.new("RGB", (10, 10), (10, 200, 30))
    assert torch.equal(loaded.pixel_values(image), processor.pixel_values(image))


def test_prompts_are_padded_on_the_left_and_qformer_texts_on_the_right(make_processor: Any) -> None:
    processor = make_processor(num_query_tokens=1)
    images = [[Image.new("RGB", (9, 9))] * 2, []]
    batch = processor(images, ["what is in the picture ?", "yes"])
    assert batch["attention_mask"].sum(1).tolist() == [2 + 1 + 6, 1 + 1]
    assert batch["attention_mask"][1].tolist() == [0] * 7 + [1] * 2
    assert batch["qformer_attention_mask"][1].tolist() == [1] * 3 + [0] * 5
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["image_groups"].valid.tolist() == [[True, True], [False, False]]


def test_the_processors_batch_generates(make_processor: Any, tiny_model: Any) -> None:
    processor, model = make_processor(), tiny_model(random_guidance=True)
    model.config.image_token_id = processor.image_token_id
    batch = processor(
        [[Image.new("RGB", (9, 9), (i * 50, 0, 90)) for i in range(3)], []], ["what ?", "where is a dog ?"]
    )
    new = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert new.shape == (2, 4) and len(processor.decode_answers(new)) == 2


def test_threads_encode_as_one_does(make_processor: Any) -> None:
    """Rust tokenizers refuse shared use while their truncation changes ("Already borrowed"); ours never changes."""
    processor = make_processor(max_instruction_tokens=5)
    texts = [" ".join(["cat", "dog"] * (1 + i % 9)) for i in range(200)]

    def encode(text: str) -> Any:
        return processor.encode(key="k", instruction=text, output="yes", num_images=1)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, texts)) == [encode(text) for text in texts]


def test_an_llm_tokenizer_without_eos_is_refused(make_processor: Any) -> None:
    processor = make_processor()
    processor.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        SamMllmProcessor(processor.image_processor, processor.tokenizer, processor.qformer_tokenizer)
