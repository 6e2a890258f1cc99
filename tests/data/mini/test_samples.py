"""What samples say is what they show, and splits keep apart what they promise to."""

import math
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from samtrain.data.mini.catalog import HELD_OUT_STYLES, TRAIN_STYLES, build_catalog
from samtrain.data.mini.vocabulary import KINDS, phrase

Samples = dict[str, list[dict[str, Any]]]
FAMILY = {label: kind.family for kind in KINDS for label in kind.labels}


def _objects(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for picture in sample["meta"]["pictures"] for item in picture["objects"]]


def _centre(item: dict[str, Any]) -> tuple[float, float]:
    left, top, right, bottom = item["box"]
    return (left + right) / 2, (top + bottom) / 2


def _each(samples: Samples, part: str) -> list[dict[str, Any]]:
    found = [sample for split in samples.values() for sample in split if sample["meta"]["part"] == part]
    assert len(found) > 30
    return found


def test_boxes_and_masks_agree(samples: Samples) -> None:
    for sample in (*samples["train"], *samples["test_style"]):
        for picture, mask, size in zip(sample["meta"]["pictures"], sample["masks"], sample["sizes"], strict=True):
            assert mask.shape == (224, 224) and size == (224, 224)
            assert set(np.unique(mask)) == {0, *(item["value"] for item in picture["objects"])}
            for item in picture["objects"]:
                rows, columns = np.nonzero(mask == item["value"])
                assert item["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_every_target_is_large_and_hardly_hidden(samples: Samples) -> None:
    for split in samples.values():
        for sample in split:
            for item in _objects(sample):
                assert item["visible"] >= 0.85
            for picture in sample["meta"]["pictures"]:
                left, top, right, bottom = picture["objects"][0]["box"]
                assert max(right - left, bottom - top) >= 40


def test_a_shared_thing_is_in_every_picture_and_is_the_only_one(samples: Samples) -> None:
    for sample in _each(samples, "group"):
        if sample["meta"]["subset"] != "identity":
            continue
        shown = [{item["identity"] for item in picture["objects"]} for picture in sample["meta"]["pictures"]]
        assert set.intersection(*shown) == {sample["meta"]["target"]}
        assert phrase(sample["meta"]["target"]).lower() in sample["output"].lower()
        assert 3 <= len(shown) <= 5


def test_a_shared_kind_is_in_every_picture_and_no_bystander_shares_a_wider_one(samples: Samples) -> None:
    plurals = {kind.name: (kind.singular, kind.plural) for kind in KINDS}
    for sample in _each(samples, "group"):
        if sample["meta"]["subset"] != "category":
            continue
        kind = sample["meta"]["kind"]
        assert any(word.lower() in sample["output"].lower() for word in plurals[kind])
        bystanders = []
        for picture in sample["meta"]["pictures"]:
            target, *others = picture["objects"]
            assert target["kind"] == kind
            assert kind not in {other["kind"] for other in others}
            bystanders.append({FAMILY[other["identity"]] for other in others} - {""})
        assert not set.intersection(*bystanders)
        assert len({picture["objects"][0]["identity"] for picture in sample["meta"]["pictures"]}) >= 2


def test_hard_distractors_are_in_all_pictures_but_one(samples: Samples) -> None:
    hard = 0
    groups = [sample for sample in _each(samples, "group") if sample["meta"]["subset"] == "identity"]
    for sample in groups:
        counts = Counter(item["identity"] for picture in sample["meta"]["pictures"] for item in picture["objects"][1:])
        hard += max(counts.values(), default=0) == len(sample["meta"]["pictures"]) - 1
    assert hard > len(groups) / 3


def test_a_cued_link_states_the_place_and_the_nearest_neighbour(samples: Samples) -> None:
    for sample in _each(samples, "linking"):
        meta = sample["meta"]
        first, *later = meta["pictures"]
        assert [item["identity"] for item in first["objects"]] == [meta["target"]]
        asked = meta["pictures"][meta["asked_picture"] - 1]
        assert asked in later
        target, *others = asked["objects"]
        assert target["identity"] == meta["target"] and 2 <= len(others) <= 4
        x, y = _centre(target)
        across = "left" if x < 112 - 36 else "right" if x > 112 + 36 else ""
        down = "top" if y < 112 - 36 else "bottom" if y > 112 + 36 else ""
        assert meta["place"] == (f"{down} {across}" if across and down else "centre")
        assert bool(across) == bool(down)
        neighbour = min(others, key=lambda other: math.dist(_centre(other), (x, y)))
        assert meta["beside"] == neighbour["identity"]
        assert meta["place"] in sample["output"] and phrase(neighbour["identity"]) in sample["output"]
        assert sample["instruction"].startswith(f"{{image#1}}Caption#1: This is {meta['name']}.{{image#2}}")
        assert sample["instruction"].count("{image#") == len(meta["pictures"]) == len(sample["images"])
        assert (f"In picture {meta['asked_picture']}:" in sample["instruction"]) == (len(later) > 1)
        for picture in later:
            assert picture["objects"][0]["identity"] == meta["target"]
            assert picture["objects"][0]["style"] != first["objects"][0]["style"]


def test_no_instruction_has_image_placeholders(samples: Samples) -> None:
    assert not any("<image>" in sample["instruction"] for split in samples.values() for sample in split)


def test_held_out_styles_appear_in_their_split_alone(samples: Samples) -> None:
    for split, rows in samples.items():
        styles = {item["style"] for sample in rows for item in _objects(sample)}
        assert styles <= set(HELD_OUT_STYLES if split == "test_style" else TRAIN_STYLES), split
    assert {item["style"] for sample in samples["test_style"] for item in _objects(sample)} == set(HELD_OUT_STYLES)


def test_held_out_identities_are_targets_that_training_never_shows(samples: Samples) -> None:
    trained = {item["identity"] for sample in samples["train"] for item in _objects(sample)}
    targets = {
        picture["objects"][0]["identity"]
        for sample in samples["test_identity"]
        for picture in sample["meta"]["pictures"]
    }
    assert not targets & trained
    for split in ("test_style", "test_combination"):
        assert not targets & {item["identity"] for sample in samples[split] for item in _objects(sample)}
    for sample in samples["test_identity"]:  # nobody can say a name that was never heard
        assert sample["meta"]["part"] == "linking" or sample["meta"]["subset"] == "category"


def test_held_out_combinations_never_share_a_picture_elsewhere(samples: Samples) -> None:
    def pairs(split: str, *, with_target: bool) -> set[frozenset[str]]:
        found = set()
        for sample in samples[split]:
            for picture in sample["meta"]["pictures"]:
                labels = [item["identity"] for item in picture["objects"]]
                chosen = ((labels[0], other) for other in labels[1:]) if with_target else combinations(labels, 2)
                found.update(frozenset(pair) for pair in chosen)
        return found

    held_out = pairs("test_combination", with_target=True)
    assert len(held_out) > 40
    for split in ("train", "validation", "test_style"):
        assert not held_out & pairs(split, with_target=False)


def test_backgrounds_of_tests_have_colours_that_training_never_shows(samples: Samples) -> None:
    def backgrounds(split: str) -> set[str]:
        return {picture["background"] for sample in samples[split] for picture in sample["meta"]["pictures"]}

    assert not (backgrounds("train") | backgrounds("validation")) & (
        backgrounds("test_style") | backgrounds("test_combination") | backgrounds("test_identity")
    )


def test_answers_are_diverse(samples: Samples) -> None:
    for task in ("animal", "vehicle", "conceptual", "linking"):
        answers = Counter(sample["output"] for sample in samples["train"] if sample["task"] == task)
        assert sum(answers.values()) >= 9
        assert max(answers.values()) <= 2


def test_roles_are_shared_out_within_every_kind(stock: Any) -> None:
    everything = build_catalog(stock, max_identities=None)
    assert len(everything) > 400
    roles = Counter(identity.role for identity in everything)
    assert roles["train"] / len(everything) == pytest.approx(0.7, abs=0.03)
    assert roles["test"] / len(everything) == pytest.approx(0.2, abs=0.03)
    for kind in KINDS:
        if kind.name:
            assert {identity.role for identity in everything if identity.kind.name == kind.name} >= {"train", "test"}
    limited = build_catalog(stock, max_identities=60)
    assert len(limited) == 60
    counts = Counter(identity.kind.task for identity in limited)
    assert min(counts.values()) >= 15
