import json
import multiprocessing
import socket
from pathlib import Path

import pytest
import torch

from samtrain.core.errors import CheckpointError, ConfigError, DataError
from samtrain.data.options import DataOptions
from samtrain.evaluation.command import EvaluateCommand, evaluate_folder
from samtrain.evaluation.dealing import cost_ordered_batches
from samtrain.evaluation.evaluator import evaluate_splits, set_name
from samtrain.evaluation.metrics import score_directory, score_pairs
from samtrain.evaluation.options import EvaluationOptions
from samtrain.generation.export import export_folder
from samtrain.generation.options import GenerationOptions

DATA, SHORT = DataOptions(path="."), GenerationOptions(num_beams=2, max_new_tokens=6)


def run(model, processor, folders, *, batch_size=2, **options):
    given = {name: options.pop(name) for name in ("train", "emit") if name in options}
    return evaluate_splits(
        model, processor, folders, options=EvaluationOptions(batch_size=batch_size, **options), generation=SHORT,
        data=DATA, **given,
    )  # fmt: skip


def test_every_sample_is_answered_in_order_and_scored_per_task(model, processor, make_split, tmp_path):
    make_split(tmp_path / "test_style")
    train = make_split(tmp_path / "train")
    events = []
    folders = {"test_style": tmp_path / "test_style"}
    result = run(model, processor, folders, train=train, emit=events.append, num_examples=3)
    assert [row.key for row in result.rows] == [f"s{i}" for i in range(9)]
    assert [row.num_images for row in result.rows] == [1, 2, 3] * 3
    assert sorted(result.scores) == ["test_style.link", "test_style.place"]
    link = [row for row in result.rows if row.task == "link"]
    expected = score_pairs([row.prediction for row in link], [row.reference for row in link], num_images=[1, 2] * 3)
    assert result.scores["test_style.link"] == expected
    guesses = score_pairs(["a cat"] * 6, [row.reference for row in link])
    assert result.majority_scores["test_style.link"].rouge_l == guesses.rouge_l
    metrics = result.metrics()
    assert metrics["eval/test_style.place/majority/rouge_l"] == 100.0
    assert metrics["eval/test_style.link/images_2/cider"] == expected.by_num_images[2]["cider"]
    assert "eval/test_style.place/images_3/cider" not in metrics  # all have three: nothing to break down
    assert [(e["done"], e["total"]) for e in events] == [(0, 9), (2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]
    # The sets in turn, then the next of each.
    assert [example.key for example in result.examples] == [
        "test_style.link: s0", "test_style.place: s2", "test_style.link: s1",
    ]  # fmt: skip
    assert len(result.examples[1].images) == 3
    result.write(tmp_path / "out")
    assert score_directory(tmp_path / "out") == result.scores
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert stored["scores"]["test_style.link"]["cider"] == expected.cider
    event = result.event()
    assert {len(row) for row in event["rows"]} == {len(event["columns"])}


def test_answers_do_not_depend_on_batch_size_and_max_samples_takes_the_first(model, processor, make_split, tmp_path):
    folders = {"test": make_split(tmp_path / "test").folder}
    whole = run(model, processor, folders, batch_size=9)
    assert len({row.prediction for row in whole.rows}) > 3
    for batch_size in (1, 4):
        assert run(model, processor, folders, batch_size=batch_size) == whole
    assert run(model, processor, folders, max_samples=4).rows == whole.rows[:4]


def test_batches_hold_similar_costs_the_largest_first(make_split, tmp_path):
    index = make_split(tmp_path / "test")
    assert cost_ordered_batches(index, 9, batch_size=4) == [[2, 5, 8, 4], [1, 7, 0, 3], [6]]
    assert cost_ordered_batches(index, 3, batch_size=2) == [[2, 1], [0]]


def test_a_sample_that_cannot_be_used_is_an_error_that_names_it(model, processor, make_split, tmp_path):
    index = make_split(tmp_path / "reference", changes={4: {"output": " . "}})
    with pytest.raises(DataError, match=r"s4: the reference answer ' \. ' has no words"):
        run(model, processor, {"test": index.folder})
    index = make_split(tmp_path / "damaged")
    shard = index.folder / index.shards[0]
    content = bytearray(shard.read_bytes())
    offset, size = index.entries[4].images[0]
    content[offset + size // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"s4\.0\.png"):
        run(model, processor, {"test": index.folder})


def test_names_of_sets_fit_folders_and_metrics():
    assert set_name("test", "what/where? now") == "test.what_where__now"
    assert set_name("test", "") == "test"


def _rank(rank, port, fixtures_path, folder, queue):
    import os
    import runpy

    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    fixtures = runpy.run_path(fixtures_path)
    processor = fixtures["make_processor"]()
    result = run(fixtures["make_model"](processor), processor, {"test": folder})
    queue.put((rank, result.rows, result.metrics(), len(result.examples)))
    dist.destroy_process_group()


def test_two_ranks_give_what_one_gives(model, processor, make_split, tmp_path):
    folder = make_split(tmp_path / "test").folder
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    fixtures_path = str(Path(__file__).parent.parent / "generation" / "conftest.py")
    processes = [context.Process(target=_rank, args=(r, port, fixtures_path, folder, queue)) for r in range(2)]
    for process in processes:
        process.start()
    answers = {rank: rest for rank, *rest in [queue.get(timeout=240) for _ in processes]}
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    one = run(model, processor, {"test": folder})
    assert answers[0][:2] == answers[1][:2] == [one.rows, one.metrics()]
    assert (answers[0][2], answers[1][2]) == (9, 0)


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    folder = tmp_path / "model"
    export_folder(model.config, processor, iter(model.state_dict().items()), folder, dtype=torch.float32)
    return folder


def test_the_command_writes_predictions_that_score_the_same(model, processor, checkpoint, make_split, tmp_path, capsys):
    folder = make_split(tmp_path / "test").folder
    command = EvaluateCommand(
        checkpoint=str(checkpoint), data=[str(folder)], output=str(tmp_path / "out"), generation=SHORT, batch_size=4
    )
    evaluate_folder(command)
    assert "test.link" in capsys.readouterr().out
    assert score_directory(tmp_path / "out") == run(model, processor, {"test": folder}).scores


def test_the_command_says_what_is_wrong_before_it_loads_the_model(make_split, tmp_path):
    def evaluate(*folders):
        data = [str(folder) for folder in folders]
        evaluate_folder(EvaluateCommand(checkpoint=str(tmp_path / "absent"), data=data, output=str(tmp_path / "out")))

    with pytest.raises(DataError, match="no such folder of shards"):
        evaluate(tmp_path / "nothing")
    one, other = make_split(tmp_path / "a" / "test").folder, make_split(tmp_path / "b" / "test").folder
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate(make_split(tmp_path / "c").folder)
    with pytest.raises(ConfigError, match="another folder is called 'test' too"):
        evaluate(one, other)
