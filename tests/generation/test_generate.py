import pytest
import torch
from PIL import Image

from samtrain.core.errors import CheckpointError, InputError
from samtrain.generation.export import export_folder
from samtrain.generation.generate import generate_answers, generate_batch, generate_from_paths
from samtrain.generation.options import GenerationOptions

SHORT = GenerationOptions(max_new_tokens=10)
TEXTS = ["What is in both pictures?", "Where is the bird?", "a cat", "is it a dog or a cat on the left"]


@pytest.fixture
def items(picture):
    counts = [2, 1, 0, 3]
    return [(text, [picture(10 * i + n) for n in range(count)]) for i, (text, count) in enumerate(zip(TEXTS, counts))]


@pytest.mark.parametrize("num_beams", [1, 5])
def test_answers_do_not_depend_on_the_batch(model, processor, items, num_beams):
    options = GenerationOptions(max_new_tokens=10, num_beams=num_beams)
    alone = generate_answers(model, processor, items, options, batch_size=1)
    assert len(set(alone)) == 4  # the comparison can fail
    for batch_size in (2, 3, 4, 9):
        assert generate_answers(model, processor, items, options, batch_size=batch_size) == alone
    assert generate_answers(model, processor, items[::-1], options, batch_size=4) == alone[::-1]


def test_greedy_answers_equal_an_argmax_loop_over_forward(model, processor, items):
    """The oracle has no cache, no batch and no `generate`."""
    options = GenerationOptions(num_beams=1, repetition_penalty=1.0, min_new_tokens=0, max_new_tokens=8)
    for instruction, images in items:
        text = processor.encode(key="k", instruction=instruction, output=None, num_images=len(images))
        pixels = torch.stack([processor.pixel_values(i) for i in images]) if images else torch.zeros(0, 3, 8, 8)
        inputs = processor.collate_prompts([(text, pixels)])
        new = []
        for _ in range(8):
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            token = int(logits.argmax())
            if token == processor.eos_token_id:
                break
            new.append(token)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert generate_batch(model, processor, [(instruction, images)], options) == [
            processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        ]


def test_images_and_their_order_matter(model, processor, picture):
    one, other = picture(1), picture(2)
    groups = [[one, other], [other, one], [one], []]
    answers = generate_answers(model, processor, [(TEXTS[0], images) for images in groups], SHORT, batch_size=4)
    assert len(set(answers)) > 1


def test_the_mode_of_the_model_is_put_back(model, processor, items):
    for mode in (True, False):
        model.train(mode)
        generate_answers(model, processor, items[:1], SHORT, batch_size=1)
        assert model.training is mode


def test_an_answer_ends_at_eos_and_leaves_it_out(model, processor, items, monkeypatch):
    greedy = GenerationOptions(num_beams=1, max_new_tokens=10)
    (free,) = generate_answers(model, processor, items[:1], greedy, batch_size=1)
    words = free.split()
    assert words[2] not in words[:2]
    eos = processor.tokenizer.convert_tokens_to_ids(words[2])
    monkeypatch.setattr(model.config, "eos_token_id", [eos])
    (ended,) = generate_answers(model, processor, items[:1], greedy, batch_size=1)
    assert ended.split() in (words[:2], words[:3])  # an ordinary word is not skipped when it plays eos
    monkeypatch.setattr(model.config, "eos_token_id", processor.eos_token_id)


@pytest.fixture
def exported(model, processor, tmp_path):
    folder = tmp_path / "export"
    export_folder(model.config, processor, iter(model.state_dict().items()), folder, dtype=torch.float32)
    return folder


def test_files_are_answered_like_pictures(model, processor, exported, tmp_path, picture):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.png")
        picture(i).save(paths[-1])
    expected = generate_answers(model, processor, [(TEXTS[0], [picture(0), picture(1)])], SHORT, batch_size=1)
    assert generate_from_paths(exported, paths, TEXTS[0], SHORT) == expected[0] != ""


def test_images_that_cannot_be_used_are_named(exported, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"absent\.png: cannot read the image"):
        generate_from_paths(exported, [tmp_path / "absent.png"], "?", SHORT)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text\.png: cannot be decoded"):
        generate_from_paths(exported, [tmp_path / "text.png"], "?", SHORT)
    with pytest.raises(InputError, match="cannot read the image: Is a directory"):
        generate_from_paths(exported, [tmp_path], "?", SHORT)
    Image.new("1", (8001, 8000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match=r"large\.png: 8001 x 8000 pixels, more than"):
        generate_from_paths(exported, [tmp_path / "large.png"], "?", SHORT)


def test_a_prompt_that_does_not_fit_its_images_is_an_input_error(exported, tmp_path, picture):
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(InputError, match="2 <image> placeholders"):
        generate_from_paths(exported, [tmp_path / "0.png"], "<image> and <image>?", SHORT)


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        generate_from_paths(tmp_path / "absent", [], "?", SHORT)
