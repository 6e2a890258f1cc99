"""Shards that break while a run reads them: cut, deleted, replaced, damaged for real, in one process and in two."""

import json
import logging
import multiprocessing
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from samtrain.core.batch import IN_QUARANTINE
from samtrain.core.errors import CheckpointError, DataError, TrainingError
from samtrain.data.agree import MIN_BAD, AgreedStep, StepAccounts
from samtrain.data.index import INDEX_FILE, ShardError, ShardIndex
from samtrain.data.ledger import Ledger
from samtrain.data.loader import TrainLoader, evaluation_steps
from samtrain.data.order import Slot
from samtrain.data.preflight import check_budgets, largest_pack, largest_sample
from samtrain.data.step import StepBuilder

BATCH = 10


@pytest.fixture
def hundred(write_set):
    """100 samples of 1 or 2 images in 20 shards: a shard is 5 % of the set."""
    return write_set("hundred", [1 + i % 2 for i in range(100)], max_samples_per_shard=5)


@pytest.fixture
def make_loader(encoder, options):
    def make(index, *, global_batch_size=BATCH, seed=7, rank=0, world_size=1, **changes):
        changed = options.model_copy(update={"max_bad_fraction": 0.1, **changes})
        return TrainLoader(
            index, encoder, changed, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size
        )

    return make


def cut(path, *, keep=1500):
    with open(path, "r+b") as stream:
        stream.truncate(keep)


def delete(path):
    path.unlink()


def unreadable(path):
    """A folder in the shard's place: it opens, and every read of it is an I/O error."""
    path.unlink()
    path.mkdir()


def grow(path):
    with open(path, "ab") as stream:
        stream.write(bytes(512))


BREAKS = [cut, delete, unreadable, grow]


def shard_of(index, number):
    return {entry.key for entry in index.entries if entry.shard == number}


def epoch(loader, steps=10):
    with loader:
        return [next(loader) for _ in range(steps)]


def used(steps):
    return sorted(key for step in steps for batch in step.micro_batches for key in batch.keys)


@pytest.mark.parametrize("break_shard", BREAKS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_breaks_after_indexing_is_quarantined_and_the_run_goes_on(
    hundred, make_loader, caplog, break_shard, num_workers
):
    index = ShardIndex.load(hundred)
    break_shard(hundred / index.shards[3])
    with caplog.at_level(logging.WARNING, "samtrain"):
        steps = epoch(make_loader(index, num_workers=num_workers), 20)
    lost = shard_of(index, 3)
    first, second = steps[:10], steps[10:]
    for part in (first, second):
        assert {key for step in part for key in step.skipped} == lost
        assert used(part) == sorted({entry.key for entry in index.entries} - lost)
        assert sorted(key for step in part for key in step.keys) == sorted(entry.key for entry in index.entries)
    named = [step.quarantined for step in steps if step.quarantined]
    assert len(named) == 1 and list(named[0]) == [index.shards[3]]
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("is quarantined" in text for text in warnings) == 1
    text = next(text for text in warnings if "is quarantined" in text)
    assert index.shards[3] in text and "5 samples" in text and named[0][index.shards[3]] in text
    assert not any("sample" in text and "is skipped:" in text for text in warnings)
    assert all(reason.startswith(IN_QUARANTINE) for step in steps for reason in step.skipped.values())


def test_the_samples_of_a_cut_shard_that_could_still_be_read_are_left_out_from_the_next_step_on(hundred, make_loader):
    index = ShardIndex.load(hundred)
    [index.read_record(i) for i in range(100)]  # every shard is open
    entries = [entry for entry in index.entries if entry.shard == 3]
    cut(hundred / index.shards[3], keep=entries[-1].record[0])  # four whole samples are left
    steps = epoch(make_loader(index, shuffle="none"), 20)
    assert steps[1].skipped.keys() == {entries[-1].key}
    assert "the shard was cut off" in steps[1].quarantined[index.shards[3]]
    assert steps[11].skipped.keys() == shard_of(index, 3)


def test_a_broken_shard_that_is_too_much_of_the_set_stops_the_run_with_one_clear_error(hundred, make_loader):
    index = ShardIndex.load(hundred)
    for number in (3, 8):
        delete(hundred / index.shards[number])
    loader = make_loader(index, max_bad_fraction=0.09, shuffle="none")
    with loader, pytest.raises(TrainingError) as caught:
        for _ in range(10):
            next(loader)
    message = str(caught.value)
    assert "10 of 100 samples (10.0 %)" in message and "data.max_bad_fraction = 0.09" in message
    assert "shard-000003.tar" in message and "shard-000008.tar" in message and "samtrain data lint" in message


def test_the_quarantine_counts_by_its_share_of_the_set_not_by_when_its_samples_are_met(hundred, make_loader):
    """All five samples of the shard are in the first step, half of what was seen then."""
    index = ShardIndex.load(hundred)
    delete(hundred / index.shards[0])
    assert len(epoch(make_loader(index, shuffle="none", max_bad_fraction=0.06))) == 10


def test_single_bad_samples_and_the_quarantine_count_together(hundred, make_loader):
    index = ShardIndex.load(hundred)
    delete(hundred / index.shards[0])
    for i in (20, 30, 40):
        overwrite(index, i, b"garbage")
    assert len(epoch(make_loader(index, shuffle="none", max_bad_fraction=0.08))) == 10
    with pytest.raises(TrainingError, match=r"3 of the \d+ samples seen.*5 of 100 samples"):
        epoch(make_loader(index, shuffle="none", max_bad_fraction=0.07))


def overwrite(index, i, content, image=0):
    """Put `content` over an image of sample i, or its record (image=None), for real."""
    entry = index.entries[i]
    offset, size = entry.record if image is None else entry.images[image]
    with open(index.folder / index.shards[entry.shard], "r+b") as stream:
        stream.seek(offset)
        stream.write((content * size)[:size])


def test_garbage_in_an_image_costs_that_sample_alone(hundred, make_loader):
    index = ShardIndex.load(hundred)
    overwrite(index, 17, b"not a picture")
    steps = epoch(make_loader(index))
    assert [key for step in steps for key in step.skipped] == ["hundred-0017"]
    assert not any(step.quarantined for step in steps)


def test_a_shard_whose_samples_are_mostly_garbage_is_quarantined(write_set, make_loader):
    index = ShardIndex.load(write_set("zeroed", [1] * 100, max_samples_per_shard=20))
    path = index.folder / index.shards[1]
    path.write_bytes(bytes(path.stat().st_size))  # as a lost network write leaves it
    steps = epoch(make_loader(index, shuffle="none", max_bad_fraction=0.5, global_batch_size=5), 20)
    (name,) = [name for step in steps for name in step.quarantined]
    assert name == "shard-000001.tar"
    reasons = [reason for step in steps for reason in step.skipped.values()]
    alone = [reason for reason in reasons if IN_QUARANTINE not in reason]
    assert len(reasons) == 20 and MIN_BAD - 5 <= len(alone) < MIN_BAD


def test_a_shard_with_some_bad_samples_among_good_ones_is_kept(write_set, make_loader):
    index = ShardIndex.load(write_set("some", [1] * 40, max_samples_per_shard=40))
    for i in range(0, 40, 3):
        overwrite(index, i, b"\0")
    steps = epoch(make_loader(index, max_bad_fraction=1.0), 12)
    assert sum(len(step.skipped) for step in steps) >= 3 * MIN_BAD and not any(step.quarantined for step in steps)


def flip_in_a_picture_that_still_decodes(index, i):
    entry = index.entries[i]
    offset, size = entry.images[0]
    path = index.folder / index.shards[entry.shard]
    with open(path, "r+b") as stream:
        stream.seek(offset + size - 30)  # in the scan's data
        byte = stream.read(1)[0]
        stream.seek(offset + size - 30)
        stream.write(bytes([byte ^ 4]))
    return index.entries[i].key


@pytest.mark.parametrize("verify_hashes", [True, False])
def test_a_flipped_byte_that_still_decodes_is_found_where_hashes_are_verified(hundred, make_loader, verify_hashes):
    index = ShardIndex.load(hundred)
    key = flip_in_a_picture_that_still_decodes(index, 21)
    steps = epoch(make_loader(index, verify_hashes=verify_hashes))
    reasons = {key: reason for step in steps for key, reason in step.skipped.items()}
    assert reasons.keys() == ({key} if verify_hashes else set())
    if verify_hashes:
        assert "sha256 is" in reasons[key]


def test_evaluation_names_a_broken_shard_too(hundred, encoder, options, caplog):
    index = ShardIndex.load(hundred)
    delete(hundred / index.shards[2])
    with caplog.at_level(logging.WARNING, "samtrain"):
        steps = list(evaluation_steps(index, encoder, options, batch_size=10, rank=0, world_size=1))
    assert used(steps) == sorted({entry.key for entry in index.entries} - shard_of(index, 2))
    assert sum("is quarantined" in record.getMessage() for record in caplog.records) == 1


def test_a_new_run_is_refused_and_a_resumed_one_goes_on_without_the_shard(hundred, make_loader, encoder, options):
    index = ShardIndex.load(hundred)
    cut(hundred / index.shards[3])
    delete(hundred / index.shards[4])
    with pytest.raises(DataError, match=r"shard-000003\.tar: 1500 bytes"):
        ShardIndex.load(hundred)
    tolerant = ShardIndex.load(hundred, tolerate_broken_shards=True)
    assert tolerant.digest == index.digest and len(tolerant) == 100
    steps = epoch(make_loader(tolerant))
    lost = shard_of(index, 3) | shard_of(index, 4)
    assert list(steps[0].quarantined) == ["shard-000003.tar", "shard-000004.tar"]
    assert {key for step in steps for key in step.skipped} == lost
    assert not any(step.quarantined for step in steps[1:])
    # What a run asks of the set before it starts works too.
    changed = options.model_copy(update={"max_images": 4})
    assert largest_pack(tolerant, encoder, changed).num_images == 4
    assert largest_sample(tolerant, encoder)["key"] not in lost
    check_budgets(tolerant, encoder, changed)


def test_a_set_of_which_nothing_can_be_read_does_not_start(hundred, encoder, options):
    index = ShardIndex.load(hundred)
    for name in index.shards:
        cut(hundred / name)
    tolerant = ShardIndex.load(hundred, tolerate_broken_shards=True)
    for ask in (largest_sample, lambda *args: largest_pack(*args, options)):
        with pytest.raises(DataError, match="shard-0000"):
            ask(tolerant, encoder)


def test_an_io_error_is_a_shard_error_and_not_a_crash(hundred):
    index = ShardIndex.load(hundred)
    unreadable(hundred / index.shards[0])
    index.shard_sizes[0] = (hundred / index.shards[0]).stat().st_size
    with pytest.raises(
        ShardError, match=r"shard-000000\.tar: hundred-0000: cannot be read: .*Is a directory"
    ) as caught:
        index.read_record(0)
    assert caught.value.shard == 0
    delete(hundred / index.shards[1])
    with pytest.raises(ShardError, match="cannot be opened any more"):
        index.read_record(5)


def test_the_ledger_names_a_quarantined_shard_where_it_was_found(tmp_path):
    with Ledger.open(tmp_path / "a") as ledger:
        ledger.record(1, ["x", "y"], {"y": "in quarantine"}, quarantined={"shard-000001.tar": "cut off"})
        ledger.record(2, ["z"], {})
    with Ledger.open(tmp_path / "b") as other:  # reasons and quarantine are not part of the hash, keys are
        other.record(1, ["x", "y"], {"y": "damaged"})
        other.record(2, ["z"], {})
    first, second = (json.loads(line) for line in (tmp_path / "a").read_text().splitlines())
    assert first["quarantined"] == {"shard-000001.tar": "cut off"} and "quarantined" not in second
    assert ledger.digest == other.digest
    with Ledger.open(tmp_path / "a", resume_step=2) as resumed:
        assert resumed.digest == ledger.digest


def test_a_shard_that_two_ranks_find_in_different_steps_is_named_once_and_known_to_all(hundred, encoder, options):
    index = ShardIndex.load(hundred)
    builder = StepBuilder(index, encoder, options, seed=0, rank=0, world_size=1, augment=False)
    accounts = StepAccounts(builder, max_bad_fraction=None)
    built = builder.build([Slot(0, 0)], cursor={})
    named = [accounts.close(AgreedStep(built, {}, found)).quarantined for found in ({3: "cut"}, {3: "gone", 4: "cut"})]
    assert named == [{"shard-000003.tar": "cut"}, {"shard-000004.tar": "cut"}]
    assert list(builder.quarantine.reasons) == [3, 4]
    again = builder.build([Slot(0, 16), Slot(0, 0)], cursor={})
    assert list(again.unusable) == [0] and not again.quarantined


# What is given up follows from the steps alone, so a resumed run gives up the same after the same step.


def zero_pictures(index, samples):
    for i in samples:
        for image in range(index.entries[i].num_images):
            overwrite(index, i, b"\0", image)


def told(steps):
    """What the ledger would say, and the state after it."""
    return [(step.keys, sorted(step.skipped), list(step.quarantined), step.cursor) for step in steps]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_gives_a_shard_of_garbage_up_after_the_same_step(write_set, make_loader, stop):
    index = ShardIndex.load(write_set("zeroed", [1] * 100, max_samples_per_shard=20))
    zero_pictures(index, range(22, 40))  # in steps of 5: two good ones, then 3, 8, ... bad ones
    changes = {"shuffle": "none", "max_bad_fraction": 0.5, "global_batch_size": 5, "num_workers": 0}
    whole = epoch(make_loader(index, **changes), 26)
    assert [i for i, step in enumerate(whole) if step.quarantined] == [5]
    assert {"zeroed-0020", "zeroed-0021"} <= whole[24].skipped.keys() and not whole[4].skipped.keys() >= {"zeroed-0020"}
    loader = make_loader(index, **changes)
    loader.load_cursor(json.loads(json.dumps(whole[stop - 1].cursor)))
    assert told(epoch(loader, 26 - stop)) == told(whole[stop:])


def test_a_resumed_run_remembers_how_many_samples_of_a_shard_were_good(write_set, make_loader):
    index = ShardIndex.load(write_set("half", [1] * 60, max_samples_per_shard=30))
    zero_pictures(index, range(15, 25))  # 10 of 25 when the last is met
    changes = {"shuffle": "none", "max_bad_fraction": 0.9, "global_batch_size": 5}
    whole = epoch(make_loader(index, **changes), 8)
    loader = make_loader(index, **changes)
    loader.load_cursor(whole[2].cursor)
    assert not any(step.quarantined for step in epoch(loader, 5))


def test_a_resumed_run_counts_bad_samples_on(write_set, make_loader):
    index = ShardIndex.load(write_set("some", [1] * 300, max_samples_per_shard=300))
    zero_pictures(index, range(0, 300, 20))  # 5 %
    changes = {"shuffle": "none", "max_bad_fraction": 0.03, "global_batch_size": 20}
    loader = make_loader(index, **changes)
    whole = epoch(loader, 3)
    loader = make_loader(index, **changes)
    loader.load_cursor(whole[-1].cursor)
    with loader, pytest.raises(TrainingError, match="4 of the 80 samples"):
        next(loader)


def test_a_resumed_run_names_what_stays_in_quarantine_and_reads_it_again_when_asked(hundred, make_loader, caplog):
    index = ShardIndex.load(hundred)
    whole_shard = (hundred / index.shards[3]).read_bytes()
    delete(hundred / index.shards[3])
    cursor = epoch(make_loader(index))[-1].cursor
    (hundred / index.shards[3]).write_bytes(whole_shard)
    for retry in (False, True):
        loader = make_loader(ShardIndex.load(hundred), retry_quarantined=retry)
        with caplog.at_level(logging.WARNING, "samtrain"):
            loader.load_cursor(cursor)
        assert {key for step in epoch(loader) for key in step.skipped} == (set() if retry else shard_of(index, 3))
        assert (f"shard {index.shards[3]} stays in quarantine" in caplog.text) is not retry
        caplog.clear()


def test_a_cursor_without_its_account_of_bad_samples_is_refused(hundred, make_loader):
    with make_loader(ShardIndex.load(hundred)) as loader:
        for bad in (None, {}, {"of_shard": {"other.tar": 1}, "quarantined": {}}):
            with pytest.raises(CheckpointError, match="account of bad samples"):
                loader.load_cursor(loader.cursor | {"bad": bad})


def test_what_later_steps_found_does_not_reach_back_into_a_step_that_is_built_again(hundred, encoder, options):
    index = ShardIndex.load(hundred)
    builder = StepBuilder(index, encoder, options, seed=0, rank=0, world_size=1, augment=False)
    delete(hundred / index.shards[3])
    index.close()
    assert list(builder.build([Slot(0, 15)], cursor={}).quarantined) == [3]
    (hundred / index.shards[3]).write_bytes(b"")
    assert list(builder.build([Slot(0, 16), Slot(0, 0)], cursor={}).unusable) == [0]
    again = builder.build([Slot(0, 16), Slot(0, 0)], cursor={}, excluded={})
    assert "cannot be opened" in again.unusable[0] or "cut off" in again.unusable[0]  # tried by itself


def test_a_shard_found_in_a_step_that_is_built_again_is_named(write_set, make_loader):
    index = ShardIndex.load(write_set("zeroed", [1] * 72, max_samples_per_shard=18))
    zero_pictures(index, range(18))
    delete(index.folder / index.shards[1])
    changes = {"shuffle": "none", "max_bad_fraction": 1.0, "global_batch_size": 5}
    with make_loader(index, prefetch_steps=4, num_workers=2, **changes) as loader:
        steps = [next(loader)]
        deadline = time.monotonic() + 20
        while not all(future.done() for future in loader._stream._waiting) and time.monotonic() < deadline:
            time.sleep(0.01)  # the step that meets the second shard is built before the first is given up
        steps += [next(loader) for _ in range(4)]
    assert [list(step.quarantined) for step in steps] == [[], [index.shards[0]], [], [index.shards[1]], []]
    assert told(steps) == told(epoch(make_loader(index, num_workers=0, **changes), 5))


# Two real processes, each with its own copy of the shards, as nodes with local disks have.


def _rank(rank, port, folder, changes, results):
    import torch.distributed as dist

    from samtrain.data.options import DataOptions

    conftest = _load_conftest()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if changes.pop("as_on_gpus", False):  # where the default group is nccl, hosts talk in a group of their own
        dist.get_backend = lambda *group: "nccl"
    index = ShardIndex.load(Path(folder) / f"copy{rank}", tolerate_broken_shards=True)
    values = {"image_size": 32, "max_tokens": 160, "max_images": 12, "num_workers": 2, "max_bad_fraction": 0.1}
    options = DataOptions(path=".", **(values | changes))
    loader = TrainLoader(
        index, conftest.WordEncoder(), options, global_batch_size=BATCH, seed=7, rank=rank, world_size=2
    )
    steps, told = [], []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("samtrain").addHandler(handler)
    try:
        with loader:
            for number in range(20):
                if number == 10 and rank == 1:  # in the middle of the run, on one node
                    cut(Path(folder) / "copy1" / index.shards[7], keep=0)
                step = next(loader)
                steps.append(
                    {
                        "keys": step.keys,
                        "used": [key for batch in step.micro_batches for key in batch.keys],
                        "num_micro_batches": len(step.micro_batches),
                        "skipped": step.skipped,
                        "quarantined": step.quarantined,
                    }
                )
        error = None
    except TrainingError as raised:
        error = str(raised)
    results.put((rank, steps, error, told))
    dist.destroy_process_group()


def _load_conftest():
    import importlib.util

    spec = importlib.util.spec_from_file_location("data_conftest", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def two_ranks(hundred, tmp_path):
    """run(**changes) -> (steps, error, log) of each rank, which reads copies/copy<rank>."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "samtrain.data.loader"])
    for rank in range(2):
        shutil.copytree(hundred, tmp_path / "copies" / f"copy{rank}")

    def run(**changes):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(rank, port, str(tmp_path / "copies"), changes, results))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        found = {}
        for process in ranks:
            process.join(60)
        for process in ranks:
            if process.is_alive():
                process.kill()
        while not results.empty():
            rank, *rest = results.get()
            found[rank] = rest
        assert sorted(found) == [0, 1], "a rank hangs or died"
        return [found[0], found[1]]

    return run


@pytest.mark.parametrize("as_on_gpus", [False, True])
def test_ranks_that_see_different_damage_agree_on_every_step(two_ranks, hundred, tmp_path, as_on_gpus):
    cut(tmp_path / "copies" / "copy1" / "shard-000003.tar")
    (one, error, told), (other, other_error, other_told) = two_ranks(as_on_gpus=as_on_gpus)
    assert error is other_error is None
    assert sum("is quarantined" in text for text in told + other_told) == 2  # two shards, each once
    index = ShardIndex.load(hundred)
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        lost = shard_of(index, 3) | (shard_of(index, 7) if number >= 10 else set())
        assert a["keys"] == b["keys"] and a["num_micro_batches"] == b["num_micro_batches"]
        assert a["quarantined"] == b["quarantined"]
        skipped = [*a["skipped"], *b["skipped"]]
        # Steps that were built ahead may still hold samples of a shard cut a moment ago.
        assert lost & set(a["keys"]) >= set(skipped) >= shard_of(index, 3) & set(a["keys"])
        assert len(skipped) == len(set(skipped))
        assert sorted(a["used"] + b["used"] + skipped) == sorted(a["keys"])
    named = [name for step in one for name in step["quarantined"]]
    assert named == ["shard-000003.tar", "shard-000007.tar"]
    assert shard_of(index, 7) & {key for steps in (one, other) for step in steps[10:] for key in step["skipped"]}


def test_all_ranks_stop_with_the_same_error_at_the_same_step(two_ranks, tmp_path):
    for number in (3, 5, 9):
        cut(tmp_path / "copies" / "copy1" / f"shard-{number:06d}.tar")
    (one, error, _), (other, other_error, _) = two_ranks(max_bad_fraction=0.12)
    assert len(one) == len(other) == 0
    assert error == other_error.replace("copy1 --fix", "copy0 --fix") and "15 of 100 samples" in error


def test_ranks_that_read_other_texts_stop_before_they_disagree(two_ranks, tmp_path):
    copy = ShardIndex.load(tmp_path / "copies" / "copy1")
    for i in range(100):  # an instruction of the same length in bytes, and of more words
        entry = copy.entries[i]
        path = copy.folder / copy.shards[entry.shard]
        data = path.read_bytes()
        record = data[entry.record[0] : sum(entry.record)].replace(b"these pictures", b"these p c ures")
        path.write_bytes(data[: entry.record[0]] + record + data[sum(entry.record) :])
    assert (tmp_path / "copies" / "copy1" / INDEX_FILE).exists()
    (one, error, _), (_, other_error, _) = two_ranks()
    assert not one and error == other_error
    assert "differ between the ranks" in error
