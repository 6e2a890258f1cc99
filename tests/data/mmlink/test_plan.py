"""Plans: one thing in all pictures, nothing else in two, every identity in one split."""

from collections import Counter
from typing import Any

import pytest

from samtrain.core.errors import DataError
from samtrain.data.mmlink.options import BuildOptions
from samtrain.data.mmlink.plan import Catalog, Plan, Usable, make_plans, wanted_counts
from samtrain.data.mmlink.records import (
    Locator,
    SourcePicture,
    content_words,
    head_word,
    split_of,
    with_article,
)

COLOURS, SHAPES = ("red", "blue", "green"), ("fox", "bus", "owl", "cup", "hat", "key", "jar", "pen", "saw", "bell")
SHAPES_MORE = tuple(
    f"{a}{b}" for a in ("wum", "tol", "bri", "kes", "nad", "pol") for b in ("ba", "to", "gi", "re", "su")
)


def usable(role: str, identity: str, pose: str, *, name: str = "", shape: str = "", **facts: Any) -> Usable:
    picture = SourcePicture(
        f"{role}/{identity}/{pose}", role, identity, pose, name or f"a {identity}", "thing", "", "test",
        Locator("file", "x"), facts,
    )  # fmt: skip
    return Usable(picture, f"key-{picture.id}", f"ref-{picture.id}", shape)


@pytest.fixture(scope="module")
def things() -> list[Usable]:
    items = [usable("object", f"{c} {s}", str(pose)) for c in COLOURS for s in SHAPES for pose in range(4)]
    items += [usable("object", name, str(pose)) for name in SHAPES_MORE for pose in range(2)]
    items += [usable("icon", name, style) for name in (*SHAPES, *SHAPES_MORE) for style in ("flat", "round")]
    for number in range(40):
        author, genre = f"Author {number % 8}", ("play", "satire", "horror")[number % 3]
        for edition in range(2):
            facts = {"title": f"Title {number}", "author": author, "genre": genre}
            items.append(usable("cover", author, f"{number}-{edition}", name=f'"Title {number}"', **facts))
    return items


def options(**changes: Any) -> BuildOptions:
    values: dict[str, Any] = {
        "output": "x",
        "num_samples": 300,
        "splits": {"train": 0.6, "validation": 0.0, "test": 0.4},
    }
    values |= {"domains": {"objects": 0.6, "icons": 0.2, "covers": 0.2}}
    values |= {"compose": {"num_images": [2, 3], "num_distractors": [1, 2], "grid": [2, 2]}}
    return BuildOptions.model_validate(values | changes)


@pytest.fixture(scope="module")
def plans(things: list[Usable]) -> list[Plan]:
    return make_plans(Catalog(things, options()), options())


def test_counts_are_exact() -> None:
    counts = wanted_counts(options(num_samples=97))
    assert sum(counts.values()) == 97
    assert counts["train", "objects"] in (34, 35, 36)
    assert "validation" not in {split for split, _ in wanted_counts(options(splits={"train": 1.0, "validation": 0.0}))}


def test_objects_show_one_identity_in_other_poses_and_neighbours_unlike_it(plans: list[Plan]) -> None:
    chosen = [plan for plan in plans if plan.domain == "objects"]
    assert {len(plan.canvases) for plan in chosen} == {2, 3}
    assert {len(canvas) for plan in chosen for canvas in plan.canvases} == {2, 3}
    for plan in chosen:
        targets = [plan.target_on(i) for i in range(len(plan.canvases))]
        assert len({target.identity for target in targets}) == 1
        assert len({target.pose for target in targets}) == len(targets)
        others = [thing for canvas in plan.canvases for thing in canvas[1:]]
        names = [plan.target.name, *(thing.name for thing in others)]
        words = [content_words(name) for name in names]
        assert all(not words[i] & words[j] for i in range(len(words)) for j in range(i)), names


def test_icons_share_exactly_one(plans: list[Plan]) -> None:
    chosen = [plan for plan in plans if plan.domain == "icons"]
    styles = Counter()
    for plan in chosen:
        first, second = ({thing.identity for thing in canvas} for canvas in plan.canvases)
        assert first & second == {plan.target.identity}
        assert len(first) == len(second) == plan.grid**2
        assert plan.target_on(0).identity == plan.target_on(1).identity
        styles[plan.target_on(0).pose == plan.target_on(1).pose] += 1
    assert styles[True] > styles[False] > 0
    assert len({plan.targets for plan in chosen}) > 5


def test_covers_are_of_two_books_that_share_what_the_plan_says(plans: list[Plan]) -> None:
    kinds = Counter()
    for plan in (plan for plan in plans if plan.domain == "covers"):
        one, other = plan.canvases[0][0], plan.canvases[1][0]
        assert one.name != other.name
        assert plan.common and ("author" not in plan.common or one.identity == other.identity)
        assert ("author" in plan.common) == (one.identity == other.identity)
        kinds[tuple(plan.common)] += 1
    assert len(kinds) >= 2


def test_an_identity_is_in_one_split_alone_and_so_is_everything_of_its_kind(plans: list[Plan]) -> None:
    seen: dict[str, set[str]] = {}
    for plan in plans:
        for thing in (thing for canvas in plan.canvases for thing in canvas):
            group = thing.identity if plan.domain == "covers" else head_word(thing.name)
            seen.setdefault(group, set()).add(plan.split)
    assert all(len(splits) == 1 for splits in seen.values())
    assert {split for splits in seen.values() for split in splits} == {"train", "test"}


def test_views_of_one_thing_that_are_named_differently_stay_in_one_split() -> None:
    """What a set's metadata may do: "a gray sofa" from the front is "a couch" from the side."""
    items = [
        usable("object", f"thing-{i}", str(pose), name=f"a word{i + 50 * pose}") for i in range(40) for pose in (0, 1)
    ]
    catalog = Catalog(items, options())
    train, test = (set(catalog.identities("object", split)) for split in ("train", "test"))
    assert train and test and not train & test and len(train | test) == 40


def test_icons_of_a_sample_share_no_word() -> None:
    colours = ("red", "blue", "green", "black")
    names = [f"{colour} {shape}" for colour in colours for shape in (*SHAPES, *SHAPES_MORE)]
    given = options(
        splits={"train": 1.0, "validation": 0.0, "test": 0.0}, domains={"objects": 0, "icons": 1, "covers": 0}
    )
    with pytest.raises(DataError, match=r"3 icons unlike a (red|blue|green|black) .* by name"):
        make_plans(Catalog([usable("icon", name, "flat") for name in names], given), given)
    mixed = [*names, *SHAPES_MORE]
    for plan in make_plans(Catalog([usable("icon", name, "flat") for name in mixed], given), given):
        words = [word for canvas in plan.canvases for thing in canvas for word in content_words(thing.name)]
        target = content_words(plan.target.name)
        assert Counter(words) == {word: 1 + (word in target) for word in words}


def test_every_identity_serves_about_equally_often(plans: list[Plan]) -> None:
    counts = Counter(plan.target.identity for plan in plans if (plan.domain, plan.split) == ("objects", "train"))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_plans_depend_on_the_seed_and_on_nothing_else(things: list[Usable], plans: list[Plan]) -> None:
    assert make_plans(Catalog(things, options()), options()) == plans
    assert make_plans(Catalog(things, options(seed=1)), options(seed=1)) != plans
    more = make_plans(Catalog(things, options(num_samples=600)), options(num_samples=600))
    assert {plan.key: plan for plan in plans}.items() <= {plan.key: plan for plan in more}.items()


def test_poses_that_look_alike_are_one_and_alike_things_share_no_sample() -> None:
    alike = [usable("object", "fox", str(i), shape=f"{i:016x}") for i in range(2)]
    assert Catalog(alike, options()).same_poses == 1
    apart = [usable("object", "fox", "0", shape="0" * 16), usable("object", "fox", "1", shape="f" * 16)]
    assert Catalog(apart, options()).same_poses == 0


def test_too_few_sources_are_told_with_what_is_there() -> None:
    few = [usable("object", "fox", str(pose)) for pose in range(3)]
    one = {"train": 1.0, "validation": 0.0, "test": 0.0}
    only = {"objects": 1.0, "icons": 0.0, "covers": 0.0}
    given = options(splits=one, domains=only)
    with pytest.raises(
        DataError, match=r"split train has 1 things in 2 or more poses and 1 things in all, and objects"
    ):
        make_plans(Catalog(few, given), given)
    given = options(splits=one, domains={"objects": 0.0, "icons": 1.0, "covers": 0.0})
    with pytest.raises(DataError, match=r"0 icons, and icons need at least 7.*domains.icons"):
        make_plans(Catalog(few, given), given)


def test_names() -> None:
    assert head_word("a mug of beer") == "mug" and head_word("an Elvish archer") == "archer"
    assert head_word("grapes") == "grape" and head_word("a glass") == "glass"
    assert content_words("a pair of red glasses") == {"red", "glasse"}
    assert with_article("gray sofa") == "a gray sofa" and with_article("owl") == "an owl"
    assert with_article("The Thing") == "The Thing"
    shares = {"train": 0.8, "test": 0.2}
    splits = Counter(split_of(f"group {i}", shares) for i in range(2000))
    assert 340 < splits["test"] < 460
