import json
from dataclasses import replace

import numpy as np
import pytest

from samtrain.core.errors import CheckpointError
from samtrain.data.order import SampleOrder, epoch_order


def make_order(**changes):
    values = {"digest": "d", "length": 50, "seed": 3, "shuffle": True, "global_batch_size": 12} | changes
    return SampleOrder(**values)


def test_an_epoch_holds_every_sample_once():
    for epoch in range(3):
        assert sorted(epoch_order(0, epoch, 1000, True).tolist()) == list(range(1000))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert np.array_equal(epoch_order(1, 2, 100, True), epoch_order(1, 2, 100, True))
    assert not np.array_equal(epoch_order(1, 2, 100, True), epoch_order(1, 3, 100, True))
    assert not np.array_equal(epoch_order(1, 2, 100, True), epoch_order(2, 2, 100, True))


def test_the_order_of_today_is_that_of_every_later_version():
    assert epoch_order(0, 0, 10, True).tolist() == [1, 8, 9, 3, 7, 0, 6, 2, 5, 4]


def test_shuffling_is_uniform_enough_that_neighbours_part():
    order = epoch_order(0, 0, 10_000, True)
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 expected
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05  # 5 standard deviations


def test_without_shuffling_the_order_is_that_of_the_set():
    assert epoch_order(9, 4, 5, False).tolist() == [0, 1, 2, 3, 4]


def test_steps_are_the_consecutive_cuts_of_the_endless_sequence():
    order = make_order()
    whole = np.concatenate([epoch_order(3, epoch, 50, True) for epoch in range(3)])
    found = [slot for step in range(12) for slot in order.slots(12 * step)]
    assert [slot.index for slot in found] == whole[:144].tolist()
    assert [slot.epoch for slot in found] == [p // 50 for p in range(144)]


def test_a_step_larger_than_the_set_spans_epochs():
    slots = make_order(length=5, global_batch_size=12).slots(0)
    assert [slot.epoch for slot in slots] == [0] * 5 + [1] * 5 + [2] * 2


def test_reading_far_ahead_needs_nothing_before_it():
    order, fresh = make_order(), make_order()
    for step in range(100):
        order.slots(12 * step)
    assert fresh.slots(12 * 99) == order.slots(12 * 99)
    assert len(order._epochs) <= 2


def test_steps_per_epoch_count_the_last_partial_step():
    assert make_order(length=50, global_batch_size=12).steps_per_epoch == 5
    assert make_order(length=48, global_batch_size=12).steps_per_epoch == 4


def test_a_cursor_survives_json():
    order = make_order()
    assert order.position(json.loads(json.dumps(order.cursor(36)))) == 36


@pytest.mark.parametrize(
    "change", [{"digest": "other"}, {"seed": 4}, {"length": 51}, {"shuffle": False}, {"global_batch_size": 6}]
)
def test_a_cursor_of_another_run_is_refused_with_both_values(change):
    ours = make_order()
    theirs = replace(ours, **change)
    (old,), name = change.values(), {"digest": "index_digest", "length": "num_samples"}.get(*change, *change)
    with pytest.raises(CheckpointError, match=f"{name} is {old!r} in the checkpoint and"):
        ours.position(theirs.cursor(12))


@pytest.mark.parametrize("position", [-1, None, "3", 1.5])
def test_a_cursor_without_a_position_is_refused(position):
    order = make_order()
    with pytest.raises(CheckpointError, match="not a count"):
        order.position(order.cursor(0) | {"position": position})
