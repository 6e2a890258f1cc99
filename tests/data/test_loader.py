import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from samtrain.core.batch import PackedBatch
from samtrain.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from samtrain.core.sample import EncodedText
from samtrain.data.index import SAMPLES_FILE, ShardIndex
from samtrain.data.loader import StepStream, TrainLoader, evaluation_steps, read_for_generation
from samtrain.data.order import epoch_order

GLOBAL_BATCH = 24


@pytest.fixture(autouse=True)
def no_thread_outlives_a_test():
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not left


@pytest.fixture
def make_loader(fifty, encoder, options):
    def make(*, index=fifty, rank=0, world_size=1, global_batch_size=GLOBAL_BATCH, seed=7, encoder=encoder, **changes):
        changed = options.model_copy(update=changes)
        return TrainLoader(
            index, encoder, changed, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size
        )

    return make


def full_order(epoch):
    return epoch_order(7, epoch, np.zeros(50, int), shuffle="full", block_shards=1)


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def used_keys(steps_of_ranks, step):
    """Keys in the micro-batches of a step, over all ranks."""
    return sorted(k for steps in steps_of_ranks for batch in steps[step].micro_batches for k in batch.keys)


def damage(index: ShardIndex, i: int, image: int | None, content: bytes = b"\0") -> ShardIndex:
    """Overwrite an image (or the record) of sample i in its shard with `content`, for real."""
    entry = index.entries[i]
    offset, size = entry.record if image is None else entry.images[image]
    with open(index.folder / index.shards[entry.shard], "r+b") as stream:
        stream.seek(offset)
        stream.write((content * size)[:size])
    return ShardIndex.load(index.folder)


def swap_image(write_set, name, i, data, counts):
    """A set whose sample i was written with `data` as its only image."""
    return ShardIndex.load(write_set(name, counts, images={i: [data]}))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_a_step_holds_the_same_samples_for_any_number_of_ranks(make_loader, fifty, world_size):
    order = [int(i) for epoch in range(2) for i in full_order(epoch)]
    ranks = [take(make_loader(rank=r, world_size=world_size), 4) for r in range(world_size)]
    for step in range(4):
        expected = [fifty.entries[i].key for i in order[GLOBAL_BATCH * step : GLOBAL_BATCH * (step + 1)]]
        assert used_keys(ranks, step) == sorted(expected)
        assert {steps[step].keys for steps in ranks} == {tuple(expected)}
        assert len({len(steps[step].micro_batches) for steps in ranks}) == 1


def test_a_sample_is_the_same_tensor_by_tensor_wherever_it_runs(make_loader):
    def by_key(steps):
        found = {}
        for batch in steps[0].micro_batches:
            for s, key in enumerate(batch.keys):
                tokens = slice(batch.cu_seqlens[s], batch.cu_seqlens[s + 1])
                images = slice(batch.cu_images[s], batch.cu_images[s + 1])
                found[key] = (batch.input_ids[tokens], batch.labels[tokens], batch.pixel_values[images])
        return found

    alone = by_key(take(make_loader(num_workers=0), 1))
    assert len(alone) == GLOBAL_BATCH
    for world_size, num_workers in ((1, 1), (1, 4), (3, 2)):
        for rank in range(world_size):
            loader = make_loader(rank=rank, world_size=world_size, num_workers=num_workers)
            for key, tensors in by_key(take(loader, 1)).items():
                assert all(torch.equal(a, b) for a, b in zip(tensors, alone[key], strict=True))


def test_another_epoch_augments_anew_and_evaluation_does_not_augment(make_loader, fifty, encoder, options):
    steps = take(make_loader(global_batch_size=50, shuffle="none"), 2)
    first, second = (step.micro_batches[0].pixel_values for step in steps)
    assert first.shape == second.shape and not torch.equal(first, second)
    plain = take(make_loader(global_batch_size=50, shuffle="none", augment=False), 2)
    assert torch.equal(plain[0].micro_batches[0].pixel_values, plain[1].micro_batches[0].pixel_values)
    evaluated = next(iter(evaluation_steps(fifty, encoder, options, batch_size=50, rank=0, world_size=1)))
    assert torch.equal(evaluated.micro_batches[0].pixel_values, plain[0].micro_batches[0].pixel_values)


def test_reduced_decode_changes_training_a_little_and_evaluation_not_at_all(write_set, make_jpeg, encoder, options):
    large = [make_jpeg(7, width=320, height=240)]
    index = ShardIndex.load(write_set("large", [1], images={0: large}))
    seen = {}
    for reduced in (True, False):
        chosen = options.model_copy(update={"reduced_decode": reduced})
        with TrainLoader(index, encoder, chosen, global_batch_size=1, seed=3, rank=0, world_size=1) as loader:
            trained = next(loader).micro_batches[0].pixel_values
        (evaluated,) = evaluation_steps(index, encoder, chosen, batch_size=1, rank=0, world_size=1)
        seen[reduced] = trained, evaluated.micro_batches[0].pixel_values
    assert not torch.equal(seen[True][0], seen[False][0])
    assert (seen[True][0] - seen[False][0]).abs().mean() * 127.5 < 3  # of 255
    assert torch.equal(seen[True][1], seen[False][1])


def test_batches_are_pinned_where_a_gpu_is_in_use_and_only_there(make_loader, monkeypatch):
    pinned = []
    monkeypatch.setattr(PackedBatch, "pin_memory", lambda self: pinned.append(self.keys) or self)
    take(make_loader(), 1)
    assert pinned == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    (step,) = take(make_loader(num_workers=0), 1)
    assert pinned == [batch.keys for batch in step.micro_batches]


def test_every_batch_is_within_budget_and_no_sample_is_cut(make_loader, fifty, encoder, options):
    for step in take(make_loader(), 6):
        for batch in step.micro_batches:
            assert batch.num_tokens <= options.max_tokens and batch.num_images <= options.max_images
            for s, key in enumerate(batch.keys):
                record, images = fifty.read_sample(int(key[-4:]))
                text = encoder.encode(
                    key=key, instruction=record.instruction, output=record.output, num_images=len(images)
                )
                assert batch.input_ids[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]].tolist() == text.input_ids
                assert batch.cu_images[s + 1] - batch.cu_images[s] == len(images)


@pytest.mark.parametrize("stop", range(8))
def test_resuming_after_any_step_continues_exactly(make_loader, stop):
    whole = take(make_loader(), 8)
    cursor = whole[stop - 1].cursor if stop else make_loader().cursor
    with make_loader() as resumed:
        resumed.load_cursor(json.loads(json.dumps(cursor)))
        rest = [next(resumed) for _ in range(8 - stop)]
    assert [step.keys for step in rest] == [step.keys for step in whole[stop:]]
    assert [step.cursor for step in rest] == [step.cursor for step in whole[stop:]]
    for a, b in zip(rest, whole[stop:]):
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert torch.equal(x.pixel_values, y.pixel_values)


def test_resuming_on_other_ranks_and_workers_neither_repeats_nor_leaves_out(make_loader):
    whole = take(make_loader(), 6)
    first = [take(make_loader(rank=r, world_size=4), 2) for r in range(4)]
    loaders = [make_loader(rank=r, world_size=3, num_workers=r) for r in range(3)]
    for loader in loaders:
        loader.load_cursor(first[0][-1].cursor)
    second = [take(loader, 4) for loader in loaders]
    found = [used_keys(first, s) for s in range(2)] + [used_keys(second, s) for s in range(4)]
    assert found == [sorted(step.keys) for step in whole]


def test_prefetching_does_not_move_the_cursor(make_loader):
    with make_loader(prefetch_steps=4) as loader:
        assert loader.cursor["position"] == 0
        for step in range(1, 4):
            handed_out = next(loader)
            deadline = time.monotonic() + 20
            while not all(future.done() for future in loader._stream._waiting) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(loader._stream._waiting) == 3  # built ahead, not handed out
            assert loader.cursor == handed_out.cursor
            assert loader.cursor["position"] == GLOBAL_BATCH * step


def test_loading_a_cursor_drops_what_was_built_ahead(make_loader):
    whole = take(make_loader(), 5)
    with make_loader(prefetch_steps=3) as loader:
        next(loader)
        loader.load_cursor(whole[3].cursor)
        assert next(loader).keys == whole[4].keys


def test_a_cursor_of_another_seed_or_set_is_refused(make_loader, write_set):
    with pytest.raises(CheckpointError, match="seed is 8 in the checkpoint and 7 now"):
        make_loader().load_cursor(make_loader(seed=8).cursor)
    other = ShardIndex.load(write_set("other", [1, 2]))
    with pytest.raises(CheckpointError, match="index_digest"):
        make_loader().load_cursor(make_loader(index=other).cursor)


def test_steps_per_epoch(make_loader):
    assert make_loader().steps_per_epoch == 3
    assert make_loader(global_batch_size=25).steps_per_epoch == 2


def test_more_ranks_than_samples_in_a_step_are_refused(make_loader):
    with pytest.raises(ConfigError, match=r"train\.global_batch_size is 2 but there are 3 ranks"):
        make_loader(global_batch_size=2, world_size=3)


@pytest.mark.parametrize("counts", [[3, 1], [1], [0, 0, 0], [0, 5, 0]])
def test_fillers_equalise_ranks_also_without_images(make_loader, write_set, counts):
    index = ShardIndex.load(write_set("few", counts))
    ranks = [take(make_loader(index=index, rank=r, world_size=4, global_batch_size=4), 3) for r in range(4)]
    for step in range(3):
        assert {len(steps[step].micro_batches) for steps in ranks} == {1}
    found = list(
        zip(
            *(
                evaluation_steps(
                    index, make_loader()._builder.encoder, make_loader().options, batch_size=9, rank=r, world_size=4
                )
                for r in range(4)
            )
        )
    )
    assert len(found) == 1
    batches = [step.micro_batches for step in found[0]]
    assert {len(b) for b in batches} == {1}
    assert sum(b[0].is_empty for b in batches) == 4 - len(counts)
    assert sorted(b[0].num_images for b in batches if not b[0].is_empty) == sorted(counts)


def test_a_damaged_image_is_skipped_with_its_reason_and_nothing_takes_its_place(make_loader, fifty):
    clean = [take(make_loader(rank=r, world_size=2), 3) for r in range(2)]
    bad = fifty.entries[int(full_order(0)[5])].key  # met in step 0
    index = damage(fifty, int(bad[-4:]), 0)
    ranks = [take(make_loader(index=index, rank=r, world_size=2, verify_hashes=True), 3) for r in range(2)]
    for step in range(3):
        reasons = {k: v for steps in ranks for k, v in steps[step].skipped.items()}
        assert set(reasons) == ({bad} if step == 0 else reasons.keys() & {bad})
        assert used_keys(ranks, step) == sorted(k for k in clean[0][step].keys if k not in reasons)
        for rank in range(2):
            assert ranks[rank][step].keys == clean[rank][step].keys
            before = [[k for k in b.keys if k not in reasons] for b in clean[rank][step].micro_batches]
            assert [list(b.keys) for b in ranks[rank][step].micro_batches] == before
    (reason,) = [v for steps in ranks for v in steps[0].skipped.values()]
    assert f"{bad}.0.jpg: sha256 is" in reason


def test_a_pack_whose_samples_all_fail_becomes_a_filler(make_loader, write_set):
    index = ShardIndex.load(write_set("two", [1, 1]))
    index = damage(index, 0, 0)
    ranks = [
        take(make_loader(index=index, rank=r, world_size=2, global_batch_size=2, max_bad_fraction=1.0), 1)
        for r in range(2)
    ]
    batches = [steps[0].micro_batches for steps in ranks]
    assert [len(b) for b in batches] == [1, 1]
    assert sorted(b[0].keys for b in batches) == [(), ("two-0001",)]


def test_a_damaged_record_is_left_out_by_every_rank_and_reported_by_one(make_loader, fifty):
    index = damage(fifty, 11, None)
    ranks = [take(make_loader(index=index, rank=r, world_size=3), 3) for r in range(3)]
    reports = [steps[s].skipped for steps in ranks for s in range(3) if "fifty-0011" in steps[s].skipped]
    assert len(reports) == sum("fifty-0011" in step.keys for step in ranks[0])
    assert "not a sample record" in reports[0]["fifty-0011"]
    for step in range(3):
        assert len({len(steps[step].micro_batches) for steps in ranks}) == 1
        assert used_keys(ranks, step) == sorted(k for k in ranks[0][step].keys if k != "fifty-0011")


def test_an_undecodable_image_is_skipped(make_loader, write_set, make_jpeg):
    index = swap_image(write_set, "cut", 1, make_jpeg(1, width=200, height=200)[:2000], [1, 1, 1])
    (step,) = take(make_loader(index=index, global_batch_size=3, shuffle="none"), 1)
    assert [b.keys for b in step.micro_batches] == [("cut-0000", "cut-0002")]
    assert "cut-0001.0.jpg: cannot be decoded" in step.skipped["cut-0001"]


def test_a_text_that_lost_an_image_token_is_skipped_with_both_counts(make_loader, encoder):
    class Truncating(type(encoder)):
        def encode(self, *, key, **values):
            text = super().encode(key=key, **values)
            return EncodedText(text.input_ids[3:], text.labels[3:], []) if key == "fifty-0002" else text

    (step,) = take(make_loader(encoder=Truncating(), global_batch_size=50), 1)
    assert "image tokens in the text but" in step.skipped.pop("fifty-0002") and not step.skipped
    assert used_keys([[step]], 0) == sorted(k for k in step.keys if k != "fifty-0002")


def test_a_picture_with_too_many_pixels_is_skipped(make_loader, write_set, make_jpeg):
    index = swap_image(write_set, "huge", 0, make_jpeg(1, width=200, height=200), [1, 1])
    (step,) = take(make_loader(index=index, global_batch_size=2, max_image_pixels=39_999), 1)
    assert "200 x 200 pixels, more than data.max_image_pixels = 39999" in step.skipped["huge-0000"]


def test_a_shard_cut_off_during_the_run_gives_skips_not_a_crash(make_loader, fifty):
    index = ShardIndex.load(fifty.folder)
    path = index.folder / index.shards[-1]
    path.write_bytes(path.read_bytes()[:2000])
    (step,) = take(make_loader(index=index, global_batch_size=50, max_bad_fraction=1.0), 1)
    lost = {entry.key for entry in index.entries if entry.shard == 3}
    assert lost - {index.entries[45].key} <= step.skipped.keys() <= lost
    assert "the shard was cut off" in step.quarantined["shard-000003.tar"]


def test_too_many_bad_samples_stop_the_run_with_some_keys(make_loader, fifty):
    index = fifty
    for i in (3, 17, 40):
        index = damage(index, i, 0)
    with make_loader(index=index, global_batch_size=50, max_bad_fraction=0.03) as loader:
        next(loader)  # three of 50: no more than 3 % of the 100 that are given as grace
        with pytest.raises(TrainingError, match=r"6 of the 100 samples .* data.max_bad_fraction = 0.03.*fifty-0003"):
            next(loader)


def test_a_single_bad_sample_stops_a_run_that_allows_none(make_loader, fifty):
    loader = make_loader(index=damage(fifty, 3, 0), global_batch_size=50, max_bad_fraction=0.0)
    with loader, pytest.raises(TrainingError, match="1 of the 50"):
        next(loader)


def test_samples_built_ahead_do_not_count_as_seen(make_loader, fifty):
    index = fifty
    for i in range(10):
        index = damage(index, i, 0)
    with make_loader(
        index=index, shuffle="none", global_batch_size=1, prefetch_steps=30, max_bad_fraction=0.05
    ) as loader:
        for _ in range(5):
            next(loader)
        with pytest.raises(TrainingError, match="6 of the 6"):
            next(loader)


def test_a_sample_over_budget_stops_every_rank_with_counts_and_keys(make_loader):
    message = r"fifty-\d+: \d+ tokens .* and 5 images \(data\.max_images = 4\)"
    for rank in range(2):
        loader = make_loader(rank=rank, world_size=2, max_images=4)
        with loader, pytest.raises(DataError, match=message):
            next(loader)


def test_errors_of_worker_threads_surface_and_the_loader_can_be_closed(make_loader, encoder):
    class Broken(type(encoder)):
        def pixel_values(self, image):
            raise ZeroDivisionError("a bug, not a bad sample")

    for num_workers in (0, 1, 3):
        with make_loader(encoder=Broken(), num_workers=num_workers) as loader:
            with pytest.raises(ZeroDivisionError):
                next(loader)
            assert loader.cursor["position"] == 0


def test_closing_ends_all_threads_also_in_the_middle_of_work(make_loader):
    before = set(threading.enumerate())
    for consumed in (0, 1, 3):
        loader = make_loader(num_workers=3, prefetch_steps=5)
        for _ in range(consumed):
            next(loader)
        if consumed:
            assert {t.name.rsplit("_", 1)[0] for t in set(threading.enumerate()) - before} >= {"samtrain-steps"}
        loader.close()
        assert set(threading.enumerate()) == before
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)


def test_prefetching_is_bounded():
    begun = []

    def begin(step, map_function):
        begun.append(step)
        return lambda: step

    stream = StepStream(begin, num_steps=None, num_workers=1, prefetch_steps=3)
    try:
        assert next(stream) == 0
        deadline = time.monotonic() + 20
        while len(begun) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert begun == [0, 1, 2]
    finally:
        stream.close()


def test_the_next_step_is_begun_before_this_one_is_finished_and_both_stay_in_order():
    calls = []
    second_begun = threading.Event()

    def begin(step, map_function):
        calls.append(("begin", step))
        if step == 1:
            second_begun.set()

        def finish():
            assert second_begun.wait(20)
            calls.append(("finish", step))
            return step

        return finish

    stream = StepStream(begin, num_steps=3, num_workers=1, prefetch_steps=2)
    try:
        assert list(stream) == [0, 1, 2]
        for kind in ("begin", "finish"):
            assert [step for name, step in calls if name == kind] == [0, 1, 2]
    finally:
        stream.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 8, 50, 64])
def test_evaluation_meets_every_sample_once_in_order(fifty, encoder, options, world_size, batch_size):
    ranks = [
        list(evaluation_steps(fifty, encoder, options, batch_size=batch_size, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert {len(steps) for steps in ranks} == {-(-50 // batch_size)}
    met = []
    for step in range(len(ranks[0])):
        assert len({len(steps[step].micro_batches) for steps in ranks}) == 1
        assert used_keys(ranks, step) == sorted(ranks[0][step].keys)
        met += ranks[0][step].keys
    assert met == [entry.key for entry in fifty.entries]


def test_an_evaluation_left_early_ends_its_threads(fifty, encoder, options):
    steps = evaluation_steps(fifty, encoder, options, batch_size=2, rank=0, world_size=1)
    next(steps)
    steps.close()


def test_generation_reads_a_sample_as_it_is(fifty, options):
    record, images = read_for_generation(fifty, 4, options)
    assert record.key == "fifty-0004"
    assert [image.size for image in images] == [(48, 40)] * len(record.images)
    assert {image.mode for image in images} == {"RGB"}
    with pytest.raises(DataError, match=r"fifty-0004\.0\.jpg"):
        read_for_generation(damage(fifty, 4, 0), 4, options)


def test_the_index_lists_what_the_records_say(fifty):
    lines = [json.loads(line) for line in Path(fifty.folder / SAMPLES_FILE).read_text().splitlines()]
    for i, line in enumerate(lines):
        record = fifty.read_record(i)
        assert line["key"] == record.key and line["task"] == record.task and len(line["images"]) == len(record.images)
