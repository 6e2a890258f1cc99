import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from samtrain.core.errors import DataError
from samtrain.data.index import INDEX_FILE, ShardIndex
from samtrain.data.shards import ShardWriter
from samtrain.data.stats import ALL, set_stats, summary


@pytest.fixture
def small(tmp_path, make_jpeg):
    """Three samples of two tasks in `train`, one in `test`."""
    rows = {
        "train": [("a", 2, "<image> and <image>: what?", "a b c"), ("a", 3, "what is it", "x"), ("b", 1, "why", "y z")],
        "test": [("a", 5, "how", "so")],
    }
    for split, samples in rows.items():
        with ShardWriter(tmp_path / "set" / split) as writer:
            for i, (task, count, instruction, output) in enumerate(samples):
                images = [make_jpeg(i, width=40 + 10 * j, height=20) for j in range(count)]
                key = f"{split}-{i}"
                writer.write(key=key, task=task, instruction=instruction, output=output, images=images)
    return tmp_path / "set"


def test_numbers_are_those_of_the_records_by_split_and_task(small):
    stats = set_stats(small)
    train, test = stats.splits["train"], stats.splits["test"]
    assert list(train) == [ALL, "a", "b"] and list(test) == [ALL, "a"]
    assert (train[ALL].num_images, train["a"].num_images, train["b"].num_images) == ([2, 3, 1], [2, 3], [1])
    assert train["a"].sizes == [(40, 20), (50, 20), (40, 20), (50, 20), (60, 20)]
    assert (train[ALL].instruction, train[ALL].output) == (
        [3, 3, 1],
        [3, 1, 2],
    )  # "and : what?"
    assert train[ALL].output_characters == [5, 1, 3]
    values = stats.to_dict()["splits"]["train"]
    assert values[ALL]["images"] == 6 and values[ALL]["images_per_sample"]["counts"] == {"1": 1, "2": 1, "3": 1}
    assert values["tasks"]["a"]["image_width"] == summary([40, 50, 40, 50, 60])
    assert values[ALL]["output_words"]["total"] == 6


def test_a_summary_is_numpys():
    values = np.random.default_rng(0).integers(0, 100, 57).tolist()
    found = summary(values)
    assert (found["min"], found["max"], found["total"]) == (min(values), max(values), sum(values))
    assert found["p95"] == pytest.approx(np.percentile(values, 95)) and found["median"] == np.median(values)
    assert summary([]) == {}


@pytest.fixture
def tokenizer(tmp_path):
    """Words and punctuation; a special token in front that must not be counted."""
    words = ["[UNK]", "[CLS]", "what", "is", "it", "?"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_tokens_are_counted_with_a_tokenizer_and_without_special_ones(small, tokenizer):
    stats = set_stats(small, tokenizer=str(tokenizer))
    assert stats.splits["train"][ALL].instruction == [4, 3, 1]  # "and", ":", "what", "?"
    assert "instruction_tokens" in stats.to_dict()["splits"]["test"][ALL]


def test_a_tokenizer_that_is_not_there_is_refused(small, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("/no/such/folder", str(small)):
        with pytest.raises(DataError, match=f"--tokenizer {name}"):
            set_stats(small, tokenizer=name)


def test_records_that_cannot_be_read_are_listed_not_counted(small):
    index = ShardIndex.load(small / "train")
    with open(index.folder / index.shards[0], "r+b") as stream:
        stream.seek(index.entries[1].record[0])
        stream.write(b"\0" * 20)
    stats = set_stats(small)
    assert stats.splits["train"][ALL].num_samples == 2
    assert list(stats.unreadable["train"]) == ["train-1"]


def test_progress_reaches_its_total(small):
    told = []
    set_stats(small, progress=lambda what, done, total: told.append((done, total)))
    assert told[-1] == (4, 4)


def test_the_command_prints_a_table_and_writes_json_and_a_figure(small, tmp_path, run_cli):
    code, out, err = run_cli("stats", small, "--json", tmp_path / "x.json", "--plot", tmp_path / "deep" / "x.png")
    assert code == 0, err
    assert "train" in out and "words" in out and "40x20" in out
    assert json.loads((tmp_path / "x.json").read_text())["splits"]["test"][ALL]["samples"] == 1
    with Image.open(tmp_path / "deep" / "x.png") as figure:
        assert figure.format == "PNG" and min(figure.size) > 500
    (small / "train" / INDEX_FILE).unlink()
    code, _, err = run_cli("stats", small)
    assert code == 2 and "samtrain data index" in err


def test_a_set_without_images_has_a_figure_too(tmp_path, run_cli):
    with ShardWriter(tmp_path / "text") as writer:
        writer.write(key="a", task="", instruction="what", output="that", images=[])
    code, _, err = run_cli("stats", tmp_path / "text", "--plot", tmp_path / "x.png")
    assert code == 0, err
