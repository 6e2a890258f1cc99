import io
import random

import pytest
from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data.index import ShardIndex
from samtrain.data.preflight import check_budgets, check_images, largest_pack, largest_sample
from samtrain.data.shards import ShardWriter


class Counting:
    """Counts the records that are encoded."""

    def __init__(self, encoder):
        self.encoder, self.encoded = encoder, []

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, *, key, **values):
        self.encoded.append(key)
        return self.encoder.encode(key=key, **values)


def all_sizes(index, encoder):
    for i in range(len(index)):
        record = index.read_record(i)
        text = encoder.encode(
            key=record.key,
            instruction=record.instruction,
            output=record.output,
            num_images=len(record.images),
        )
        yield text.num_tokens, record.key, len(record.images)


def test_the_largest_sample_is_the_largest_of_all(fifty, encoder):
    found = largest_sample(fifty, encoder)
    assert found["num_tokens"] == max(all_sizes(fifty, encoder))[0]
    assert (found["num_tokens"], found["key"], found["num_images"]) in all_sizes(fifty, encoder)


def test_the_largest_sample_is_found_where_bytes_mislead(tmp_path, encoder):
    with ShardWriter(tmp_path) as writer:
        writer.write(key="long-word", task="t", instruction="x" * 500, output="y", images=[])
        writer.write(key="many-words", task="t", instruction="x " * 60, output="y", images=[])
        for i in range(20):
            writer.write(key=f"small-{i}", task="t", instruction="x", output="y", images=[])
    assert largest_sample(ShardIndex.load(tmp_path), encoder)["key"] == "many-words"


def test_a_text_denser_than_those_sampled_is_found_within_the_margin(tmp_path, encoder):
    texts = ["x" * 400 + " w" * 39] * 300 + ["ww " * 110] * 1700  # many bytes and few tokens; 0.31 tokens a byte
    texts[1003] = "ww " * 80 + "w " * 40  # 0.35 tokens a byte; neither among the 256 spread nor the 256 of most bytes
    with ShardWriter(tmp_path, max_samples_per_shard=2000) as writer:
        for i, text in enumerate(texts):
            writer.write(key=f"s-{i}", task="t", instruction=text.strip(), output="y", images=[])
    assert largest_sample(ShardIndex.load(tmp_path), encoder)["key"] == "s-1003"


@pytest.mark.parametrize("seed", range(3))
def test_few_of_many_samples_are_encoded_to_find_the_largest(tmp_path, encoder, seed):
    draw = random.Random(seed)
    with ShardWriter(tmp_path) as writer:
        for i in range(3000):
            text = " ".join("w" * draw.randint(2, 9) for _ in range(draw.randint(1, 60)))
            writer.write(key=f"s-{i}", task="t", instruction=text, output="y", images=[])
    index, counting = ShardIndex.load(tmp_path), Counting(encoder)
    assert largest_sample(index, counting)["num_tokens"] == max(all_sizes(index, encoder))[0]
    assert len(counting.encoded) < 1500


def test_budgets_that_fit_are_accepted_exactly(fifty, encoder, options):
    largest = largest_sample(fifty, encoder)["num_tokens"]
    check_budgets(fifty, encoder, options.model_copy(update={"max_tokens": largest, "max_images": 5}))
    with pytest.raises(DataError, match=rf"fifty-\d+: {largest} tokens \(data\.max_tokens = {largest - 1}\)"):
        check_budgets(fifty, encoder, options.model_copy(update={"max_tokens": largest - 1}))
    with pytest.raises(DataError, match=r"and 5 images \(data\.max_images = 4\): raise the budget"):
        check_budgets(fifty, encoder, options.model_copy(update={"max_images": 4}))


def test_a_generous_budget_encodes_no_sample(fifty, encoder, options):
    counting = Counting(encoder)
    check_budgets(fifty, counting, options.model_copy(update={"max_tokens": 2048}))
    assert set(counting.encoded) == {"(empty)"}


def test_a_set_none_of_whose_images_can_be_used_is_refused(fifty, tmp_path, options):
    check_images(fifty, options)
    with pytest.raises(DataError, match=r"none of 13 samples .* x \d+ pixels, more than data.max_image_pixels = 100"):
        check_images(fifty, options.model_copy(update={"max_image_pixels": 100}))


def test_one_good_sample_among_those_tried_is_enough(tmp_path, options):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png = buffer.getvalue()
    with ShardWriter(tmp_path) as writer:
        for i in range(3):
            data = png if i == 2 else png[:50] + b"\0" * 20
            writer.write(key=f"s-{i}", task="t", instruction="x", output="y", images=[data])
    check_images(ShardIndex.load(tmp_path), options)


def test_the_largest_pack_fills_a_budget(fifty, encoder, options):
    batch = largest_pack(fifty, encoder, options)
    assert batch.num_images > options.max_images - 5 or batch.num_tokens > options.max_tokens * 0.7
    assert batch.num_images <= options.max_images and batch.num_tokens <= options.max_tokens
