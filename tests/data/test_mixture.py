"""Several sources as one set: keys and shards that stay apart, budgets, quarantine, errors of recipes."""

import logging
import shutil

import pytest

from samtrain.core.batch import IN_QUARANTINE
from samtrain.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from samtrain.core.options import parse_options
from samtrain.data.index import ShardError, ShardIndex
from samtrain.data.loader import TrainLoader
from samtrain.data.mixture import MixedIndex, folders_of, open_training_set, shares_of, sources_of
from samtrain.data.options import DataOptions
from samtrain.data.preflight import check_budgets, largest_pack, largest_sample
from samtrain.data.shards import build_index
from samtrain.recipe import Recipe

BATCH = 10


@pytest.fixture
def one(write_set):
    """60 samples in 6 shards, below `one/train`."""
    return write_set("one/train", [1 + i % 3 for i in range(60)], max_samples_per_shard=10).parent


@pytest.fixture
def two(one, tmp_path):
    """The same keys in another place, in other bytes: `two/extra` has 20 of the samples."""
    folder = tmp_path / "two" / "extra"
    shutil.copytree(one / "train", folder)
    for shard in sorted(folder.glob("*.tar"))[2:]:
        shard.unlink()
    for file in folder.glob("index.json*"):
        file.unlink()
    build_index(folder)
    return folder.parent


@pytest.fixture
def mixed(one, two, options):
    """Options of a mixture in which `rare` has a quarter of the weight."""
    sources = [
        {"name": "rare", "path": str(two), "weight": 0.25, "split": "extra"},
        {"name": "common", "path": str(one), "weight": 0.75},
    ]
    changes = {"path": "", "validation_split": None, "mixture": sources}
    return DataOptions.model_validate(options.model_dump() | {"max_bad_fraction": 0.5} | changes)


@pytest.fixture
def run(encoder, mixed):
    def take(steps, *, options=mixed, index=None, rank=0, world_size=1, cursor=None):
        index = index or open_training_set(options)
        loader = TrainLoader(index, encoder, options, global_batch_size=BATCH, seed=1, rank=rank, world_size=world_size)
        with loader:
            if cursor:
                loader.load_cursor(cursor)
            return [next(loader) for _ in range(steps)]

    return take


def test_a_mixture_looks_like_one_set(mixed, one, two):
    index = open_training_set(mixed)
    assert isinstance(index, MixedIndex) and len(index) == 80
    assert list(sources_of(index)) == ["common", "rare"]
    assert folders_of(index) == [str(one / "train"), str(two / "extra")]
    assert shares_of(index) == {"common": 0.75, "rare": 0.25}
    assert len({entry.key for entry in index.entries}) == 80
    assert index.shards[0] == "common/shard-000000.tar" and index.shards[6] == "rare/shard-000000.tar"
    for i in (0, 59, 60, 79):
        entry, record = index.entries[i], index.read_record(i)
        assert record.key == entry.key and record.key.split("/")[0] == ("common" if i < 60 else "rare")
        own = sources_of(index)[record.key.split("/")[0]]
        assert index.read_images(i, record) == own.read_sample(i % 60)[1]
        assert index.shards[entry.shard].endswith(own.shards[own.entries[i % 60].shard])


def test_the_order_of_a_recipe_list_means_nothing_and_names_do(mixed, one, two):
    def digest(*names):
        places = {"common": one / "train", "rare": two / "extra", "other": two / "extra"}
        return MixedIndex({n: ShardIndex.load(places[n]) for n in names}, dict.fromkeys(names, 1.0)).digest

    assert digest("common", "rare") == digest("rare", "common") == open_training_set(mixed).digest
    assert digest("common", "other") != digest("common", "rare")


def test_steps_hold_the_sources_in_proportion_and_each_key_once_an_epoch_of_its_source(run):
    keys = [key for step in run(40) for key in step.keys]
    rare = [key for key in keys if key.startswith("rare/")]
    common = [key for key in keys if key.startswith("common/")]
    assert len(rare) + len(common) == 400 and len(rare) == pytest.approx(100, abs=15)
    for found, length in ((rare, 20), (common, 60)):
        for start in range(0, len(found) - length, length):
            assert len(set(found[start : start + length])) == length


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_steps_of_a_mixture(run, world_size):
    alone = run(5)
    ranks = [run(5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, parts in enumerate(zip(*ranks)):
        used = [key for part in parts for batch in part.micro_batches for key in batch.keys]
        assert sorted(used) == sorted(alone[step].keys) and {part.keys for part in parts} == {alone[step].keys}


def test_an_epoch_is_all_samples_once_over(encoder, mixed):
    index = open_training_set(mixed)
    with TrainLoader(index, encoder, mixed, global_batch_size=9, seed=0, rank=0, world_size=1) as loader:
        assert loader.steps_per_epoch == 9


def test_resuming_a_mixture_continues_it_and_other_weights_are_refused(run, mixed):
    whole = run(9)
    assert [step.keys for step in run(5, cursor=whole[3].cursor)] == [step.keys for step in whole[4:]]
    sources = [s.model_copy(update={"weight": 1.0}) for s in mixed.mixture]
    with pytest.raises(CheckpointError, match=r"weights is \{'common': 3, 'rare': 1\} in the checkpoint and"):
        run(1, options=mixed.model_copy(update={"mixture": sources}), cursor=whole[3].cursor)


def test_a_shard_that_breaks_is_named_with_its_source_and_counts_by_weight(run, mixed, two, caplog):
    index = open_training_set(mixed)
    (two / "extra" / "shard-000001.tar").unlink()
    with caplog.at_level(logging.WARNING, "samtrain"):
        steps = run(20, index=index)
    (named,) = [list(step.quarantined) for step in steps if step.quarantined]
    assert named == ["rare/shard-000001.tar"]
    assert sum("shard rare/shard-000001.tar is quarantined, its 10 samples" in r.message for r in caplog.records) == 1
    lost = {entry.key for entry in index.entries if entry.shard == 7}
    skipped = {key: why for step in steps for key, why in step.skipped.items()}
    assert skipped.keys() == lost and set(skipped.values()) == {f"{IN_QUARANTINE}rare/shard-000001.tar"}
    # It is 10 of 80 samples, and half of a source with a quarter of the weight: 12.5 % either way; with more weight
    # it is more.
    sources = [s.model_copy(update={"weight": 1.0}) for s in mixed.mixture]
    heavy = mixed.model_copy(update={"mixture": sources, "max_bad_fraction": 0.2})
    message = r"10 of 80 samples \(25.0 % by weight\) are in 1 quarantined shards.*data lint .*two/extra --fix"
    with pytest.raises(TrainingError, match=message):
        run(20, options=heavy, index=MixedIndex(index.sources, {"common": 1.0, "rare": 1.0}))


def test_a_resumed_mixture_knows_broken_shards_by_their_number_among_all(mixed, two):
    (two / "extra" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        open_training_set(mixed)
    index = open_training_set(mixed, tolerate_broken_shards=True)
    assert list(index.broken_shards) == [7]
    with pytest.raises(ShardError) as caught:
        index.read_record(75)
    assert caught.value.shard == 7


def test_what_a_run_asks_of_its_set_first_works_with_mixtures(mixed, encoder):
    index = open_training_set(mixed)
    assert largest_sample(index, encoder)["num_images"] == 3
    assert largest_pack(index, encoder, mixed).num_images <= mixed.max_images
    with pytest.raises(DataError, match=r"(common|rare)/one/train-\d+: .* 3 images \(data.max_images = 2\)"):
        check_budgets(index, encoder, mixed.model_copy(update={"max_images": 2}))


def test_a_source_without_its_split_is_named_with_what_is_there(mixed):
    sources = [source.model_copy(update={"split": None}) for source in mixed.mixture]
    with pytest.raises(DataError, match=r"data\.mixture: rare: .*two has no split 'train' \(it holds extra\)"):
        open_training_set(mixed.model_copy(update={"mixture": sources}))


A = {"name": "a", "path": "x", "weight": 1.0}
B = {"name": "b", "path": "y", "weight": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": [A, B | {"weight": 0}]}, r"data\.mixture\.1\.weight` = 0: .*greater than 0"),
        ({"mixture": [A, B | {"weight": -1.5}]}, r"data\.mixture\.1\.weight` = -1\.5"),
        ({"mixture": [A, B | {"weight": float("inf")}]}, r"data\.mixture\.1\.weight` = inf: .*finite"),
        ({"mixture": [A, B | {"weight": float("nan")}]}, r"data\.mixture\.1\.weight` = nan"),
        ({"mixture": [A, B | {"weight": 1e-9}]}, "'b' has weight 1e-09 .*less than one sample in a million"),
        ({"mixture": [A, B | {"name": "a"}]}, "two sources have the name 'a'"),
        ({"mixture": [A, B | {"path": "x"}]}, "'a' and 'b' are the same samples"),
        ({"mixture": [A, B | {"weigth": 2}]}, "unknown key `data.mixture.1.weigth`; did you mean `weight`"),
        ({"mixture": [{"name": "a", "path": "x"}]}, "`data.mixture.0.weight` is required and missing"),
        ({"mixture": [A | {"name": "a/b"}]}, r"data\.mixture\.0\.name` = 'a/b'"),
        ({"mixture": [A], "path": "p"}, r"data\.path \(p\) is not trained on beside data\.mixture"),
        ({"mixture": [A], "validation_split": "held"}, "data.validation_split is 'held' and data.path.* is missing"),
        ({"mixture": [A], "build": "mmlink-mini"}, "data.build is 'mmlink-mini' and data.path.* is missing"),
        ({}, "data.path is required and missing"),
        ({"path": "p", "shuffle": True}, r"data\.shuffle` = True: .*'full', 'shards' or 'none'"),
        ({"path": "p", "shuffle_block_shards": 0}, "shuffle_block_shards"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_with_key_and_way_out(changes, message):
    data = {"validation_split": None} | changes
    with pytest.raises(ConfigError, match=f"r.yaml: .*{message}"):
        parse_options(Recipe, {"name": "n", "output_dir": "o", "data": data}, source="r.yaml")


def test_held_out_splits_of_a_run_on_a_mixture_need_a_path():
    data = {"mixture": [A, B], "validation_split": None}
    values = {"name": "n", "output_dir": "o", "data": data, "evaluation": {"splits": ["test"]}}
    with pytest.raises(
        ConfigError, match=r"evaluation\.splits is \['test'\] and data\.path, where they are, is missing"
    ):
        parse_options(Recipe, values, source="r.yaml")
    recipe = parse_options(Recipe, values | {"data": data | {"path": "p"}}, source="r.yaml")
    assert recipe.data.mixture[1].name == "b"
