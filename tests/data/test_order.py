import json
import tracemalloc

import numpy as np
import pytest

from samtrain.core.errors import CheckpointError
from samtrain.data.interleave import MIN_BLOCK, Interleaving, whole_weights
from samtrain.data.order import SampleOrder, Source, epoch_order

ORDERS = ("full", "shards", "none")


def shards_of(*sizes):
    """[samples] the shard of each sample, for shards of these sizes."""
    return np.repeat(np.arange(len(sizes)), sizes)


UNEVEN = shards_of(7, 1, 13, 5, 5, 20, 2, 9, 11, 4, 0, 3)


def order_of(seed, epoch, shards=UNEVEN, *, shuffle="full", block_shards=3):
    return epoch_order(seed, epoch, shards, shuffle=shuffle, block_shards=block_shards)


def source(name, shards=UNEVEN, weight=1.0):
    return Source(name, shards, int(shards.max()) + 1, weight)


def make_order(**changes):
    values = {
        "digest": "d",
        "sources": [source("")],
        "seed": 3,
        "shuffle": "full",
        "block_shards": 3,
        "global_batch_size": 12,
    }
    return SampleOrder(**(values | changes))


@pytest.mark.parametrize("shuffle", ORDERS)
def test_an_epoch_holds_every_sample_once(shuffle):
    for epoch in range(3):
        assert sorted(order_of(0, epoch, shuffle=shuffle).tolist()) == list(range(80))


@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_the_order_depends_on_seed_and_epoch_alone(shuffle):
    assert np.array_equal(order_of(1, 2, shuffle=shuffle), order_of(1, 2, shuffle=shuffle))
    assert not np.array_equal(order_of(1, 2, shuffle=shuffle), order_of(1, 3, shuffle=shuffle))
    assert not np.array_equal(order_of(1, 2, shuffle=shuffle), order_of(2, 2, shuffle=shuffle))


def test_the_order_of_today_is_that_of_every_later_version():
    assert order_of(0, 0, shards_of(10)).tolist() == [1, 8, 9, 3, 7, 0, 6, 2, 5, 4]
    assert order_of(0, 0, shards_of(2, 2, 2, 2, 2), shuffle="shards", block_shards=2).tolist() == [
        7,
        6,
        5,
        4,
        1,
        8,
        9,
        0,
        3,
        2,
    ]
    sources, turns = Interleaving([1, 3], seed=0).places(300, 308)
    assert (sources.tolist(), turns.tolist()) == ([1, 1, 1, 0, 1, 1, 0, 0], [228, 229, 230, 72, 231, 232, 73, 74])


def test_shuffling_is_uniform_enough_that_neighbours_part():
    order = order_of(0, 0, shards_of(10_000))
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 expected
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05  # 5 standard deviations


def test_without_shuffling_the_order_is_that_of_the_set():
    assert order_of(9, 4, shards_of(2, 3), shuffle="none").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("block_shards", [1, 2, 3, 5, 12, 100])
def test_no_more_shards_than_a_block_are_open_at_a_time(block_shards):
    for epoch in range(5):
        order = order_of(0, epoch, shuffle="shards", block_shards=block_shards)
        touched = UNEVEN[order]
        first, last = ({s: f(np.flatnonzero(touched == s)) for s in set(touched)} for f in (np.min, np.max))
        for place in range(80):  # open is what was begun and is not read to its end
            assert sum(first[s] <= place <= last[s] for s in first) <= block_shards


def test_the_samples_of_a_block_are_shuffled_together_and_blocks_differ_between_epochs():
    shards = shards_of(*[50] * 20)
    epochs = [shards[order_of(0, e, shards, shuffle="shards", block_shards=4)].reshape(5, 200) for e in range(2)]
    for blocks in epochs:
        assert all(len(set(block)) == 4 for block in blocks.tolist())
        assert all((np.diff(block) != 0).sum() > 40 for block in blocks)  # 150 expected: not shard after shard
    together = [{frozenset(block) for block in blocks.tolist()} for blocks in epochs]
    assert not together[0] & together[1]


def test_a_set_of_one_block_is_shuffled_as_a_whole():
    assert np.array_equal(order_of(5, 1, shuffle="shards", block_shards=12), order_of(5, 1, shuffle="full"))


def test_samples_need_not_lie_in_the_order_of_their_shards():
    mixed = UNEVEN[order_of(1, 1)]
    order = order_of(0, 0, mixed, shuffle="shards", block_shards=1)
    assert sorted(order.tolist()) == list(range(80))
    assert (np.diff(mixed[order]) != 0).sum() == len(set(mixed.tolist())) - 1


def test_a_million_samples_take_little_memory():
    shards = shards_of(*[500] * 2000).astype(np.int32)
    tracemalloc.start()
    order = order_of(0, 0, shards, shuffle="shards", block_shards=16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(order) == 1_000_000 and peak < 64 * 10**6


@pytest.mark.parametrize("shuffle", ORDERS)
def test_steps_are_the_consecutive_cuts_of_the_endless_sequence(shuffle):
    order = make_order(shuffle=shuffle)
    whole = np.concatenate([order_of(3, epoch, shuffle=shuffle) for epoch in range(3)])
    found = [slot for step in range(20) for slot in order.slots(12 * step)]
    assert [slot.index for slot in found] == whole.tolist()
    assert [slot.epoch for slot in found] == [p // 80 for p in range(240)]


def test_a_step_larger_than_the_set_spans_epochs():
    slots = make_order(sources=[source("", shards_of(5))], global_batch_size=12).slots(0)
    assert [slot.epoch for slot in slots] == [0] * 5 + [1] * 5 + [2] * 2


MIXTURE = [source("a", UNEVEN, 0.5), source("b", shards_of(3, 4), 0.3), source("c", shards_of(30), 0.2)]


@pytest.mark.parametrize("sources", [[source("")], MIXTURE])
def test_reading_far_ahead_needs_nothing_before_it_and_keeps_nothing(sources):
    order = make_order(sources=sources)
    for step in range(100):
        order.slots(12 * step)
    assert make_order(sources=sources).slots(12 * 99) == order.slots(12 * 99)
    assert all(len(epochs._kept) <= 2 for epochs in order._epochs) and len(order._interleaving._kept) <= 2
    far = make_order(sources=sources).slots(12 * 10**12)
    assert far[0].epoch > 10**9


def test_going_back_gives_the_same_again():
    order = make_order(sources=MIXTURE)
    there = [order.slots(12 * step) for step in range(60)]
    assert [order.slots(12 * step) for step in reversed(range(60))] == there[::-1]


# Mixtures.


@pytest.mark.parametrize("weights", [[1, 1], [0.1, 0.2, 0.7], [5, 1], [1 / 3, 2 / 3], [1e-3, 1], [7, 0.013, 2, 40]])
def test_shares_are_exact_at_every_position_and_do_not_drift(weights):
    interleaving = Interleaving(weights, seed=1)
    block = interleaving.block
    assert block >= MIN_BLOCK and all(block * w >= 0.999 * sum(weights) for w in weights)
    for b in (0, 1, 2, 3, 1000, 10**9):
        counts = interleaving.turns(b * block)
        assert sum(counts) == b * block
        for count, weight in zip(counts, whole_weights(weights)):
            assert abs(count * sum(whole_weights(weights)) - b * block * weight) < sum(whole_weights(weights))
    sources, turns = interleaving.places(0, 4 * block)
    for i in range(len(weights)):  # each source takes its turns in order, none left out
        assert np.array_equal(turns[sources == i], np.arange((sources == i).sum()))
        assert interleaving.turns(4 * block)[i] == (sources == i).sum()
    start = block + 17
    pieces = [Interleaving(weights, seed=1).places(s, s + 10) for s in range(start, start + 50, 10)]
    assert np.array_equal(np.concatenate([p[0] for p in pieces]), sources[start : start + 50])
    assert interleaving.turns(start) == np.bincount(sources[:start], minlength=len(weights)).tolist()


def test_sources_come_mixed_and_blocks_differ():
    sources, _ = Interleaving([1, 1], seed=0).places(0, 2 * MIN_BLOCK)
    first, second = sources[:MIN_BLOCK], sources[MIN_BLOCK:]
    assert not np.array_equal(first, second)
    assert (np.diff(first) != 0).sum() > MIN_BLOCK / 4  # half expected
    other, _ = Interleaving([1, 1], seed=1).places(0, MIN_BLOCK)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shuffle", ORDERS)
def test_each_source_of_a_mixture_runs_through_its_own_epochs(shuffle):
    order = make_order(sources=MIXTURE, shuffle=shuffle)
    slots = [slot for step in range(200) for slot in order.slots(12 * step)]
    first = 0
    for member in MIXTURE:
        length = len(member.shards)
        mine = [slot for slot in slots if first <= slot.index < first + length]
        assert len(mine) == pytest.approx(2400 * member.weight, abs=40)
        assert [slot.epoch for slot in mine] == [n // length for n in range(len(mine))]
        for epoch in range(len(mine) // length):
            indices = [slot.index - first for slot in mine if slot.epoch == epoch]
            assert sorted(indices) == list(range(length))
        first += length


def test_a_sources_own_order_does_not_depend_on_its_neighbours_or_weights():
    def of_b(sources):
        order, first = make_order(sources=sources), 0
        for member in sources:
            if member.name == "b":
                break
            first += len(member.shards)
        slots = [slot for step in range(30) for slot in order.slots(12 * step)]
        return [slot.index - first for slot in slots if first <= slot.index < first + 7][:50]

    assert of_b(MIXTURE) == of_b([source("b", shards_of(3, 4), 9.0), source("z", shards_of(11), 1.0)])


def test_an_epoch_of_a_mixture_is_as_many_samples_as_its_sources_hold():
    assert make_order(sources=MIXTURE).steps_per_epoch == -(-117 // 12)


@pytest.mark.parametrize("shuffle", ORDERS)
@pytest.mark.parametrize("sources", [[source("")], MIXTURE])
def test_how_often_shards_were_met_is_known_without_going_there(shuffle, sources):
    order = make_order(sources=sources, shuffle=shuffle)
    firsts = np.cumsum([0] + [s.num_shards for s in sources])
    shards = np.concatenate([first + s.shards for first, s in zip(firsts, sources)])
    met = np.zeros(firsts[-1], dtype=int)
    for step in range(40):
        assert np.array_equal(order.times_met(12 * step), met)
        np.add.at(met, shards[[slot.index for slot in order.slots(12 * step)]], 1)


# The cursor.


def test_steps_per_epoch_count_the_last_partial_step():
    assert make_order(global_batch_size=12).steps_per_epoch == 7
    assert make_order(global_batch_size=40).steps_per_epoch == 2


def test_a_cursor_survives_json():
    order = make_order(sources=MIXTURE)
    assert order.position(json.loads(json.dumps(order.cursor(36)))) == 36


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"digest": "other"}, "index_digest"),
        ({"seed": 4}, "seed"),
        ({"sources": [source("a", shards_of(81))]}, "num_samples"),
        ({"shuffle": "full"}, "shuffle"),
        ({"block_shards": 4}, "shuffle_block_shards"),
        ({"global_batch_size": 6}, "global_batch_size"),
        ({"sources": [source("a", UNEVEN, 2.0), source("b", shards_of(1))]}, "num_samples"),
    ],
)
def test_a_cursor_of_another_run_is_refused_with_both_values(change, name):
    ours, theirs = make_order(shuffle="shards"), make_order(**({"shuffle": "shards"} | change))
    with pytest.raises(CheckpointError, match=f"{name} is .* in the checkpoint and"):
        ours.position(theirs.cursor(12))


def test_other_weights_are_another_order_and_the_same_proportions_are_not():
    def mixed(*weights):
        return make_order(sources=[source("a", UNEVEN, weights[0]), source("b", UNEVEN, weights[1])])

    assert mixed(1, 2).position(mixed(0.1, 0.2).cursor(24)) == 24
    assert mixed(1, 2).slots(24) == mixed(0.1, 0.2).slots(24)
    with pytest.raises(CheckpointError, match=r"weights is \{'a': 1, 'b': 3\} in the checkpoint and \{'a': 1, 'b': 2"):
        mixed(1, 2).position(mixed(1, 3).cursor(24))


def test_the_block_matters_where_shards_are_shuffled_alone():
    assert make_order(block_shards=9).position(make_order(block_shards=3).cursor(12)) == 12


@pytest.mark.parametrize("position", [-1, None, "3", 1.5])
def test_a_cursor_without_a_position_is_refused(position):
    order = make_order()
    with pytest.raises(CheckpointError, match="not a count"):
        order.position(order.cursor(0) | {"position": position})
