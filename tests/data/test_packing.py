import random
import re

import pytest

from samtrain.core.errors import DataError
from samtrain.data.packing import SampleSize, check_fits, deal, pack

WORLD_SIZES = (1, 2, 3, 4, 5, 8)


def random_sizes(seed, count=24):
    draw = random.Random(seed)
    return [SampleSize(f"s{i}", draw.randint(10, 90), draw.randint(0, 5)) for i in range(count)]


def packed(sizes):
    return pack(sizes, max_tokens=200, max_images=9)


def dealt(sizes, world_size, *, max_tokens=200, max_images=9):
    return deal(sizes, max_tokens=max_tokens, max_images=max_images, world_size=world_size)


@pytest.mark.parametrize("seed", range(20))
def test_packs_hold_every_sample_once_within_both_budgets(seed):
    sizes = random_sizes(seed)
    packs = packed(sizes)
    assert sorted(i for p in packs for i in p) == list(range(24))
    for p in packs:
        assert sum(sizes[i].num_tokens for i in p) <= 200
        assert sum(sizes[i].num_images for i in p) <= 9


def test_packs_are_no_more_than_twice_the_least_possible():
    for seed in range(20):
        sizes = random_sizes(seed)
        least = max(sum(s.num_tokens for s in sizes) / 200, sum(s.num_images for s in sizes) / 9)
        assert len(packed(sizes)) <= 1.5 * least + 1


def test_large_samples_are_placed_first():
    sizes = [SampleSize(f"s{i}", tokens, 1) for i, tokens in enumerate((60, 60, 60, 140, 140, 140))]
    assert packed(sizes) == [[0, 3], [1, 4], [2, 5]]  # in the order given it would be four packs


@pytest.mark.parametrize(("tokens", "images"), [(201, 1), (20, 10), (300, 20)])
def test_a_sample_over_budget_is_named_with_counts_and_keys(tokens, images):
    size = SampleSize("big", tokens, images)
    message = re.escape(
        f"big: {tokens} tokens (data.max_tokens = 200) and {images} images (data.max_images = 9): raise"
    )
    with pytest.raises(DataError, match=message):
        packed([SampleSize("small", 1, 1), size])
    check_fits(SampleSize("fits", 200, 9), max_tokens=200, max_images=9)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("seed", range(10))
def test_every_rank_gets_equally_many_places_within_the_budgets_and_every_sample_is_dealt_once(seed, world_size):
    sizes = random_sizes(seed)
    hands = dealt(sizes, world_size)
    assert len({len(hand) for hand in hands}) == 1 and len(hands) == world_size
    assert sorted(i for hand in hands for p in hand if p for i in p) == list(range(24))
    for hand in hands:
        for p in hand:
            assert sum(sizes[i].num_tokens for i in p or ()) <= 200
            assert sum(sizes[i].num_images for i in p or ()) <= 9


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_there_are_as_few_rounds_as_first_fit_decreasing_allows(world_size):
    for seed in range(10):
        sizes = random_sizes(seed)
        assert len(dealt(sizes, world_size)[0]) == -(-len(packed(sizes)) // world_size)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_packs_of_a_round_cost_alike(world_size):
    """A round costs what its costliest pack costs: the others wait."""
    waited = total = 0.0
    for seed in range(10):
        sizes = random_sizes(seed, count=16 * world_size)
        for packs in zip(*dealt(sizes, world_size, max_tokens=600, max_images=32)):
            costs = [sum(sizes[i].cost for i in p or ()) for p in packs]
            waited += max(costs) * world_size - sum(costs)
            total += max(costs) * world_size
    assert waited < 0.03 * total


def test_budgets_too_tight_to_spread_leave_the_fewest_packs():
    # Images cost most, so the second and the first go apart by cost, and then the third finds no room.
    sizes = [SampleSize(f"s{i}", tokens, images) for i, (tokens, images) in enumerate([(4, 1), (5, 1), (8, 0), (1, 0)])]
    hands = dealt(sizes, 2, max_tokens=10, max_images=5)
    assert sorted(p for hand in hands for p in hand) == [[0, 1], [2, 3]]


def test_ranks_add_up_alike_over_rounds():
    sizes = [SampleSize(f"s{i}", tokens, 0) for i, tokens in enumerate((10, 7, 9, 8))]
    assert dealt(sizes, 2, max_tokens=10) == [[[0], [1]], [[2], [3]]]  # 10 + 7 and 9 + 8


def test_one_pack_is_shared_before_a_rank_idles():
    sizes = [SampleSize(f"s{i}", 10, 1) for i in range(8)]
    assert len(packed(sizes)) == 1
    for world_size in (2, 3, 8):
        hands = dealt(sizes, world_size)
        assert all(len(hand) == 1 and hand[0] for hand in hands)


def test_fillers_stand_where_samples_ran_out():
    sizes = [SampleSize("a", 10, 3), SampleSize("b", 10, 1)]
    assert dealt(sizes, 4) == [[[0]], [[1]], [None], [None]]


def test_a_step_without_a_usable_sample_is_one_filler_on_every_rank():
    assert dealt([], 3) == [[None], [None], [None]]


def test_images_and_image_pairs_cost():
    plain, one, two = (SampleSize("s", 100, n) for n in (0, 1, 2))
    assert plain.cost < one.cost
    assert two.cost - one.cost > one.cost - plain.cost
