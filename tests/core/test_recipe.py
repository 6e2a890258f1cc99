from pathlib import Path

import pytest

from samtrain.core.errors import ConfigError
from samtrain.recipe import Recipe, load_recipe, parse_recipe

MINIMAL = "name: tiny\noutput_dir: runs/tiny\ndata:\n  path: data/tiny\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_minimal_recipe_has_the_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.name, recipe.seed, recipe.train.learning_rate) == ("tiny", 42, 2e-5)


def test_an_unknown_key_names_file_key_and_the_nearest_known_one(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "train:\n  learning_rat: 0.1\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "`train.learning_rat`" in str(caught.value) and "`learning_rate`" in str(caught.value)


def test_an_unknown_key_deep_inside_names_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`train.zero.overlap_com`; did you mean `overlap_comm`"):
        load_recipe(write(tmp_path, MINIMAL + "train:\n  zero:\n    overlap_com: true\n"))


def test_an_unknown_key_like_no_other_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"known keys here: .*launch.*tracking"):
        load_recipe(write(tmp_path, MINIMAL + "xyzzy: 1\n"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train:\n  max_steps: '8'\n", "train.max_steps"),
        ("train:\n  max_steps: 8.5\n", "train.max_steps"),
        ("train:\n  learning_rate: fast\n", "train.learning_rate"),
        ("data:\n  path: x\n  augment: 1\n", "data.augment"),
        ("train:\n  precision: fp16\n", "train.precision"),
        ("train:\n  learning_rate: -1.0\n", "train.learning_rate"),
    ],
)
def test_a_wrong_type_or_value_is_an_error_that_names_key_and_value(tmp_path: Path, text: str, key: str) -> None:
    minimal = MINIMAL if "data:" not in text else MINIMAL.split("data:")[0]
    with pytest.raises(ConfigError, match=f"`{key}"):
        load_recipe(write(tmp_path, minimal + text))


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, MINIMAL + "sed: 1\ntrain:\n  max_steps: no\n"))
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`output_dir` is required"):
        load_recipe(write(tmp_path, "name: tiny\ndata:\n  path: x\n"))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4"])
def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + f"train:\n  learning_rate: {text}\n"))
    assert recipe.train.learning_rate == 1e-4


def test_a_name_that_looks_like_a_number_with_exponent_stays_text_in_quotes(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("tiny\n", "'1e4'\n", 1)))
    assert recipe.name == "1e4"


def test_base_is_found_beside_the_file_and_merged_section_by_section(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "seed: 1\ntrain:\n  max_steps: 5\n  weight_decay: 0.5\n", "base.yaml")
    write(tmp_path, "base: base.yaml\nseed: 2\ntrain:\n  max_steps: 6\n", "middle.yaml")
    recipe = load_recipe(write(tmp_path, "base: middle.yaml\nname: top\n"))
    assert (recipe.name, recipe.seed, recipe.train.max_steps, recipe.train.weight_decay) == ("top", 2, 6, 0.5)


def test_recipes_that_include_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="include each other"):
        load_recipe(tmp_path / "a.yaml")


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "train:\n  max_steps: 5\n")
    overrides = [
        "train.max_steps=7",
        "train.learning_rate=1e-3",
        "evaluation.splits=[a, b]",
        "data.validation_split=null",
    ]
    recipe = load_recipe(path, overrides)
    assert (recipe.train.max_steps, recipe.train.learning_rate) == (7, 1e-3)
    assert (recipe.evaluation.splits, recipe.data.validation_split) == (["a", "b"], None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "write key=value"),
        ("=3", "write key=value"),
        ("name.first=3", "is a value, not a section"),
        ("train.max_step=3", "did you mean `max_steps`"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_a_bad_override_is_an_error_that_shows_it(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, MINIMAL), [override])


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'seed' is given twice"):
        load_recipe(write(tmp_path, MINIMAL + "seed: 1\nseed: 2\n"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        load_recipe(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read"):
        load_recipe(tmp_path / "absent.yaml")


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(write(tmp_path, MINIMAL + "description: !!python/object/apply:os.getcwd []\n"))


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    overrides = ["train.learning_rate=3e-7", "train.learning_rates={qformer: 1e-5}", "description='Größe: ä, #1'"]
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert parse_recipe(recipe.to_yaml(), source="itself") == recipe
    assert load_recipe(write(tmp_path, recipe.to_yaml(), "again.yaml")) == recipe


def test_a_batch_the_workers_cannot_share_is_refused_with_the_nearest_that_they_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size \(10\).*launch\.num_workers \(4\).*8 or 12"):
        load_recipe(write(tmp_path, MINIMAL), ["train.global_batch_size=10", "launch.num_workers=4"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.guidance.mode=none"], r"model\.guidance\.mode: none there is no context"),
        (["model.guidance.context=own"], r"model\.guidance\.context: own there is no context"),
    ],
)
def test_a_context_gain_that_cannot_be_measured_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    asked = ["evaluation.context_gain=true", "evaluation.splits=[test]"]
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path, asked).evaluation.context_gain
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, [*asked, *overrides])


def test_the_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").glob("[!_]*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_of_the_house_resolves_and_tells_what_it_is(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe) and recipe.description
