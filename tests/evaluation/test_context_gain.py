"""What the context is worth, against losses of samples that really are fed other images and of a model with B zero."""

import json
import multiprocessing
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

from samtrain import cli
from samtrain.core.batch import ImageGroups
from samtrain.core.errors import DataError, InputError
from samtrain.core.seeds import derive_seed
from samtrain.data.loader import read_for_generation
from samtrain.data.options import DataOptions
from samtrain.data.step import encode_checked
from samtrain.evaluation.context_gain import SampleLosses, context_gains, draw_stand_ins, measure_losses
from samtrain.evaluation.evaluator import evaluate_splits, set_name
from samtrain.evaluation.options import EvaluationOptions
from samtrain.evaluation.report import context_gain_rows
from samtrain.generation.export import export_folder
from samtrain.generation.options import GenerationOptions

DATA = DataOptions(path=".")
FIXTURES = str(Path(__file__).parent.parent / "generation" / "conftest.py")


@pytest.fixture
def guided(fixtures, processor):
    """A model in float64 with guidance that acts; keyword arguments replace those of its configuration."""

    def make(*, context="others", mode="bidirectional", kernels="materialised"):
        model = fixtures["make_model"](processor)
        config = type(model.config).from_dict(
            model.config.to_dict() | {"guidance_context": context, "guidance_mode": mode}
        )
        other = type(model)(config)
        state = model.state_dict() if mode == "bidirectional" else other.state_dict()
        other.load_state_dict(state)
        other.kernels = kernels
        return other.double().eval()

    return make


def measured(model, processor, index, *, batch_size=2, count=9):
    records = [index.read_record(i) for i in range(count)]
    sets = [set_name("test", record.task) for record in records]
    losses = measure_losses(
        model, processor, index, sets, data=DATA, batch_size=batch_size, what="measuring", emit=lambda event: None
    )
    return sets, losses


def pixels_of(index, i, processor):
    return torch.stack([processor.pixel_values(image) for image in read_for_generation(index, i, DATA)[1]])


def loss_of(model, processor, record, query_outputs):
    """The summed loss of an answer after visual tokens of query outputs [I, Q, D]."""
    text = encode_checked(processor, record)
    ids, labels = torch.tensor(text.input_ids)[None], torch.tensor(text.labels)[None]
    embeddings = model.get_input_embeddings()(ids.masked_fill(ids == processor.image_token_id, 0))
    embeddings[ids == processor.image_token_id] = model.language_projection(query_outputs).flatten(0, 1)
    logits = model.language_model(inputs_embeds=embeddings).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))


def outputs_of(model, processor, record, pixels):
    text = torch.tensor(encode_checked(processor, record).qformer_input_ids)[None]
    groups = ImageGroups.from_counts([len(pixels)])
    return model.encode_images(pixels.double(), groups, text, torch.ones_like(text))


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["materialised", "reference"])
def test_losses_are_those_of_samples_really_fed_other_images(guided, processor, make_split, tmp_path, kernels):
    index = make_split(tmp_path / "test")
    model, without = guided(kernels=kernels), guided(kernels=kernels)
    for parameter in without.guidance.context_projection.parameters():
        parameter.zero_()
    sets, losses = measured(model, processor, index)
    # Each image is fed as one of a sample that otherwise holds the images of another.
    members = {name: [i for i in range(9) if sets[i] == name] for name in set(sets)}
    for name, of_set in members.items():
        drawn = draw_stand_ins([1 + i % 3 for i in of_set], seed=derive_seed("context gain", name))
        for i, places in zip(of_set, drawn):
            record, own = index.read_record(i), pixels_of(index, i, processor)
            others = torch.stack([pixels_of(index, of_set[j], processor)[slot] for j, slot in places])
            outputs = []
            for slot in range(len(own)):
                fed = others.clone()
                fed[slot] = own[slot]
                outputs.append(outputs_of(model, processor, record, fed)[slot])
            shuffled = loss_of(model, processor, record, torch.stack(outputs))
            true, none = (
                loss_of(m, processor, record, outputs_of(m, processor, record, own)) for m in (model, without)
            )
            assert losses[i].true == pytest.approx(true, abs=1e-9)
            assert losses[i].none == pytest.approx(none, abs=1e-9)
            assert losses[i].num_label_tokens == sum(label >= 0 for label in encode_checked(processor, record).labels)
            if len(own) == 1:
                assert losses[i].shuffled is None and losses[i].none == losses[i].true
            else:
                assert losses[i].shuffled == pytest.approx(shuffled, abs=1e-9)
                assert len({losses[i].true, losses[i].none, losses[i].shuffled}) == 3


@pytest.mark.parametrize("context", ["others", "all"])
def test_gains_are_exactly_zero_where_b_is(processor, guided, make_split, tmp_path, context):
    index = make_split(tmp_path / "test")
    model = guided(context=context).float()
    with torch.no_grad():
        for parameter in model.guidance.context_projection.parameters():
            parameter.zero_()
    sets, losses = measured(model, processor, index)
    assert all(sample.true == sample.none and sample.shuffled in (None, sample.true) for sample in losses)
    gains = context_gains(sets, losses)
    assert {(gain.gain_none, gain.gain_shuffled) for gain in gains.values()} == {(0.0, 0.0)}


def test_with_all_an_image_alone_has_a_context_to_shuffle(guided, processor, make_split, tmp_path):
    index = make_split(tmp_path / "test")
    _, losses = measured(guided(context="all"), processor, index)
    alone = [sample for sample in losses if sample.num_images == 1]
    assert len(alone) == 3 and None not in [sample.shuffled for sample in alone]
    assert all(len({sample.true, sample.none, sample.shuffled}) == 3 for sample in alone)


def test_losses_are_the_same_again_and_for_any_batch_size(guided, processor, make_split, tmp_path):
    index = make_split(tmp_path / "test")
    model = guided()
    first = measured(model, processor, index)
    assert first == measured(model, processor, index, batch_size=9) == measured(model, processor, index, batch_size=1)
    assert [sample.num_images for sample in first[1]] == [1, 2, 3] * 3


def test_the_models_mode_is_put_back_and_dropout_rests(guided, processor, make_split, tmp_path):
    index = make_split(tmp_path / "test")
    model = guided().train()
    expected = measured(guided(), processor, index)
    assert measured(model, processor, index) == expected and model.training


@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 3, 3, 3, 1], [4, 1, 2, 2], [5, 1], [2, 0, 2], [3] * 40])
def test_stand_ins_are_images_of_other_samples_as_many_as_there_are(counts):
    drawn = draw_stand_ins(counts, seed=3)
    assert [len(places) for places in drawn] == counts
    for i, places in enumerate(drawn):
        assert all(j != i and 0 <= slot < counts[j] for j, slot in places)
    assert drawn == draw_stand_ins(counts, seed=3)


def test_stand_ins_of_equally_large_samples_are_one_sample_in_order():
    drawn = draw_stand_ins([3] * 40, seed=0)
    givers = [places[0][0] for places in drawn]
    assert all(places == [(places[0][0], slot) for slot in range(3)] for places in drawn)
    assert sorted(givers) == list(range(40))  # each stands in once
    assert drawn != draw_stand_ins([3] * 40, seed=1)


def test_samples_of_as_many_images_stand_in_for_each_other_but_for_the_last_of_a_size():
    counts = [2, 3, 4] * 20
    drawn = draw_stand_ins(counts, seed=0)
    whole = [i for i, places in enumerate(drawn) if places == [(places[0][0], slot) for slot in range(counts[i])]]
    same = [i for i in whole if counts[drawn[i][0][0]] == counts[i]]
    assert len(same) == len(counts) - 3


def test_the_only_sample_of_a_set_has_no_stand_ins():
    assert draw_stand_ins([3], seed=0) == [[]] and draw_stand_ins([3, 0], seed=0) == [[], []]


LOSSES = [
    SampleLosses(1, 2, true=4.0, none=4.0, shuffled=None),
    SampleLosses(2, 3, true=3.0, none=6.0, shuffled=4.5),
    SampleLosses(2, 1, true=1.0, none=0.0, shuffled=2.0),
    SampleLosses(3, 4, true=2.0, none=3.0, shuffled=None),
]


def test_gains_are_per_label_token_of_the_samples_that_have_both_losses():
    gains = context_gains(["a", "a", "a", "b"], LOSSES)
    a = gains["a"]
    assert (a.num_samples, a.num_shuffled, a.loss, a.loss_none) == (3, 2, 8 / 6, 10 / 6)
    assert (a.loss_shuffled, a.gain_none, a.gain_shuffled) == (6.5 / 4, 2 / 6, 2.5 / 4)
    assert a.gain_shuffled_interval == [0.5, 1.0]  # of two samples
    assert sorted(a.by_num_images) == [1, 2] and a.by_num_images[1].gain_shuffled is None
    assert a.by_num_images[2].gain_none == 2 / 4
    b = gains["b"]
    assert b.metrics() == {"loss": 0.5, "loss_context_none": 0.75, "context_gain_none": 0.25}
    assert json.loads(json.dumps(a.to_dict()))["by_num_images"]["2"]["gain_shuffled"] == 2.5 / 4
    assert context_gain_rows(gains) == [
        ["a", "all", "3", "1.3333", "1.6667", "1.6250", "+0.3333", "+0.6250"],
        ["", "1", "1", "2.0000", "2.0000", "", "+0.0000", ""],
        ["", "2", "2", "1.0000", "1.5000", "1.6250", "+0.5000", "+0.6250"],
        ["b", "3", "1", "0.5000", "0.7500", "", "+0.2500", ""],
    ]


def evaluated(model, processor, folders, **options):
    return evaluate_splits(
        model, processor, folders, options=EvaluationOptions(batch_size=2, **options), data=DATA,
        generation=GenerationOptions(num_beams=1, max_new_tokens=2),
    )  # fmt: skip


def test_an_evaluation_has_the_gains_beside_its_scores(guided, processor, make_split, tmp_path):
    model, index = guided().float(), make_split(tmp_path / "test")
    result = evaluated(model, processor, {"test": index.folder}, context_gain=True)
    assert result.context_gain == context_gains(*measured(model, processor, index))
    metrics = result.metrics()
    link = result.context_gain["test.link"]
    assert metrics["eval/test.link/context_gain_none"] == link.gain_none != 0.0
    assert metrics["eval/test.link/context_gain_shuffled"] == link.gain_shuffled != 0.0
    assert metrics["eval/test.link/loss"] == link.loss
    assert metrics["eval/test.link/loss_context_none"] == link.loss_none
    assert metrics["eval/test.link/loss_context_shuffled"] == link.loss_shuffled
    assert metrics["eval/test.link/images_2/context_gain_none"] == link.by_num_images[2].gain_none
    assert "eval/test.link/images_1/context_gain_shuffled" not in metrics  # an image alone
    assert "eval/test.place/images_3/loss" not in metrics  # all have three: nothing to break down
    event = result.context_gain_event()
    assert {len(row) for row in event["rows"]} == {len(event["columns"])}
    plain = evaluated(model, processor, {"test": index.folder})
    assert plain.context_gain == {} and "context_gain" not in plain.to_dict() and plain.scores == result.scores


@pytest.mark.parametrize(
    ("changes", "message"), [({"mode": "none"}, "no guidance"), ({"context": "own"}, "own image alone")]
)
def test_a_model_that_reads_no_other_image_is_refused(guided, processor, make_split, tmp_path, changes, message):
    index = make_split(tmp_path / "test")
    with pytest.raises(InputError, match=message):
        evaluated(guided(**changes).float(), processor, {"test": index.folder}, context_gain=True)


def test_a_sample_that_cannot_be_read_is_named(guided, processor, make_split, tmp_path):
    index = make_split(tmp_path / "test")
    shard = index.folder / index.shards[0]
    content = bytearray(shard.read_bytes())
    offset, size = index.entries[4].images[0]
    content[offset + size // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"s4\.0"):
        measured(guided(), processor, index)


def _rank(rank, port, folder, queue):
    import os
    import runpy

    import torch.distributed as dist

    from samtrain.data.index import ShardIndex

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    fixtures = runpy.run_path(FIXTURES)
    processor = fixtures["make_processor"]()
    queue.put((rank, measured(fixtures["make_model"](processor), processor, ShardIndex.load(folder))))
    dist.destroy_process_group()


def test_two_ranks_measure_what_one_measures(model, processor, make_split, tmp_path):
    index = make_split(tmp_path / "test")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, port, index.folder, queue)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found[0] == found[1] == measured(model, processor, index)


def test_the_command_prints_and_stores_the_gains(model, processor, make_split, tmp_path, capsys, monkeypatch):
    folder = make_split(tmp_path / "test").folder
    checkpoint = tmp_path / "model"
    export_folder(model.config, processor, iter(model.state_dict().items()), checkpoint, dtype=torch.float32)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["eval", str(checkpoint), "--data", str(folder), "--num-beams", "1", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["samtrain", *arguments, "--output", str(tmp_path / "out"), "--context-gain"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())["context_gain"]
    assert sorted(stored) == ["test.link", "test.place"]
    for gain in stored.values():
        assert f"{gain['gain_none']:+.4f}" in printed and f"{gain['gain_shuffled']:+.4f}" in printed
    assert "nats per label token" in printed and re.search(r"3 samples have no context to shuffle", printed)


def test_the_command_refuses_a_model_without_context_before_it_is_loaded(
    guided, processor, make_split, tmp_path, capsys, monkeypatch
):
    folder, model = make_split(tmp_path / "test").folder, guided(context="own").float()
    checkpoint = tmp_path / "model"
    export_folder(model.config, processor, iter(model.state_dict().items()), checkpoint, dtype=torch.float32)
    (checkpoint / "model.safetensors").unlink()
    monkeypatch.setattr(sys, "argv", ["samtrain", "eval", str(checkpoint), "--data", str(folder), "--context-gain"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "guidance_context: own" in capsys.readouterr().err
