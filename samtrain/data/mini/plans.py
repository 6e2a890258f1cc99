"""What a sample shows and asks, decided before a pixel is drawn.

A plan names, picture by picture, the things and their styles. Part 1 (group captioning) shares one thing, or one kind
of thing, between all pictures, often with a distractor that is in all of them but one. Part 2 (cued linking)
shows the target alone in picture 1, then in other styles among others.
"""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from samtrain.core.errors import DataError
from samtrain.data.mini import catalog as roles
from samtrain.data.mini.catalog import Identity
from samtrain.data.mini.vocabulary import ANIMAL, CONCEPTUAL, VEHICLE, Kind

T = TypeVar("T")
SPLITS = ("train", "validation", "test_style", "test_combination", "test_identity")
LINKING = "linking"
IDENTITY, CATEGORY = "identity", "category"
# Twenty samples in a row hold every (task, subset) this often: linking 8, animal 4, vehicle 3, conceptual 5.
_CYCLE: tuple[tuple[str, str], ...] = (
    (LINKING, ""), (ANIMAL, IDENTITY), (LINKING, ""), (CONCEPTUAL, IDENTITY), (VEHICLE, IDENTITY),
    (LINKING, ""), (CONCEPTUAL, CATEGORY), (ANIMAL, IDENTITY), (LINKING, ""), (VEHICLE, CATEGORY),
    (LINKING, ""), (CONCEPTUAL, IDENTITY), (LINKING, ""), (ANIMAL, CATEGORY), (VEHICLE, IDENTITY),
    (LINKING, ""), (CONCEPTUAL, CATEGORY), (ANIMAL, IDENTITY), (LINKING, ""), (CONCEPTUAL, IDENTITY),
)  # fmt: skip
_NOTHING: frozenset[str] = frozenset()
_HARD_DISTRACTOR = 0.6  # share of samples with a distractor in all pictures but one
_LINKING_IMAGES = (2, 2, 3, 3, 4, 5)


@dataclass(frozen=True)
class Thing:
    """One drawing in a picture."""

    identity: Identity
    style: str


@dataclass(frozen=True)
class Plan:
    """pictures: the things of each, the target first. layout: "free" | "grid" (pictures after the first are on places).

    asked: 1-based number of the picture a linking question is about, 0 for none.
    """

    task: str
    subset: str
    target: Identity | None
    kind: Kind
    pictures: tuple[tuple[Thing, ...], ...]
    asked: int = 0


class Planner:
    """Draws plans for one split; the rules of the split decide which things, styles and pairs it may use."""

    def __init__(self, identities: tuple[Identity, ...], split: str) -> None:
        self.split = split
        self.styles = roles.HELD_OUT_STYLES if split == "test_style" else roles.TRAIN_STYLES
        role = roles.TEST if split == "test_identity" else roles.TRAIN
        drawn = [identity for identity in identities if identity.styles_in(self.styles)]
        self.companions = [identity for identity in drawn if identity.role == roles.TRAIN]
        two_styles = [identity for identity in drawn if len(identity.styles_in(self.styles)) >= 2]
        self.targets = [item for item in two_styles if item.role == role and self._num_partners(item) >= 2]
        self.unseen_targets = [item for item in two_styles if split == "validation" and item.role == roles.VALIDATION]
        members: dict[str, list[Identity]] = {}
        for identity in drawn:
            if identity.role == role and identity.kind.name and self._num_partners(identity) >= 2:
                members.setdefault(identity.kind.name, []).append(identity)
        self.kind_members = {name: items for name, items in members.items() if len(items) >= 2}
        if not self.targets:
            raise DataError(f"data.mini.max_identities leaves nothing for {split}; raise it, or set it to null for all")

    def plan(self, index: int, rng: np.random.Generator) -> Plan:
        """The plan of sample `index`; which task it has depends on the index alone."""
        task, subset = _CYCLE[index % len(_CYCLE)]
        if task == LINKING:
            return self._linking(index, rng)
        if self.split == "test_identity":
            subset = CATEGORY  # nobody can produce a name that was never heard
        if subset == IDENTITY:
            targets = [identity for identity in self.targets if identity.kind.task == task]
            if targets:
                return self._group_of_identity(task, _choose(targets, rng), rng)
        kinds = [items for items in self.kind_members.values() if items[0].kind.task == task]
        return self._group_of_kind(task, _choose(kinds, rng), rng) if kinds else self._linking(index, rng)

    def _group_of_identity(self, task: str, target: Identity, rng: np.random.Generator) -> Plan:
        styles = _shuffled(target.styles_in(self.styles), rng)
        num_images = min(int(rng.integers(3, 6)), max(3, len(styles)))
        hard = self._pick([target], rng) if rng.random() < _HARD_DISTRACTOR else None
        absent = int(rng.integers(num_images))
        usage: Counter[str] = Counter()
        pictures = []
        for i in range(num_images):
            present = [target, *([hard] if hard and i != absent else [])]
            for _ in range(int(rng.integers(1, 4)) - (len(present) - 1)):
                barred = {label for label in usage if usage[label] >= num_images - 1}
                found = self._pick(present, rng, barred=barred | ({hard.label} if hard else set()))
                if found:
                    present.append(found)
                    usage[found.label] += 1
            pictures.append(self._styled(present, styles[i % len(styles)], rng))
        return Plan(task, IDENTITY, target, target.kind, tuple(pictures))

    def _group_of_kind(self, task: str, members: list[Identity], rng: np.random.Generator) -> Plan:
        num_images = int(rng.integers(3, 6))
        kind = members[0].kind
        shown = _shuffled(members, rng)
        other_kinds = sorted({item.kind.name for item in self.companions if item.kind.family != kind.family} - {""})
        hard = _choose(other_kinds, rng) if other_kinds and rng.random() < _HARD_DISTRACTOR else None
        hard_family = next((item.kind.family for item in self.companions if item.kind.name == hard), "")
        absent = int(rng.integers(num_images))
        usage: Counter[str] = Counter()  # pictures per family
        pictures = []
        for i in range(num_images):
            target = shown[i % len(shown)]
            present = [target]
            if hard and i != absent and (found := self._pick(present, rng, kind=hard)):
                present.append(found)
            # Only the target is of `kind`, and nothing but it has a family in common with all pictures.
            barred = {kind.name, hard_family, *(family for family in usage if usage[family] >= num_images - 1)} - {""}
            for _ in range(int(rng.integers(1, 4)) - (len(present) - 1)):
                found = self._pick(present, rng, barred=barred)
                if found:
                    present.append(found)
            usage.update({item.kind.family for item in present[1:]})
            pictures.append(self._styled(present, _choose(target.styles_in(self.styles), rng), rng))
        return Plan(task, CATEGORY, None, kind, tuple(pictures))

    def _linking(self, index: int, rng: np.random.Generator) -> Plan:
        unseen = bool(self.unseen_targets) and index % 4 < 2
        target = _choose(self.unseen_targets if unseen else self.targets, rng)
        first, *others = _shuffled(target.styles_in(self.styles), rng)
        num_images = int(rng.choice(_LINKING_IMAGES))
        # In (nearly) every later picture, as the target is: only picture 1 tells who is meant.
        constant = self._pick([target], rng)
        pictures: list[tuple[Thing, ...]] = [(Thing(target, first),)]
        for i in range(num_images - 1):
            present = [target, *([constant] if constant and rng.random() < 0.8 else [])]
            for _ in range(int(rng.integers(3, 6)) - len(present)):
                found = self._pick(present, rng)
                if found:
                    present.append(found)
            pictures.append(self._styled(present, others[i % len(others)], rng))
        asked = int(rng.integers(2, num_images + 1))
        subset = "unseen identity" if target.role != roles.TRAIN else "seen identity"
        return Plan(LINKING, subset, target, target.kind, tuple(pictures), asked)

    def _styled(self, present: list[Identity], target_style: str, rng: np.random.Generator) -> tuple[Thing, ...]:
        target, *others = present
        return (
            Thing(target, target_style),
            *(Thing(identity, _choose(identity.styles_in(self.styles), rng)) for identity in others),
        )

    def _pick(
        self, present: list[Identity], rng: np.random.Generator, *, kind: str | None = None, barred: Set[str] = _NOTHING
    ) -> Identity | None:
        """Another thing that may share a picture with all that are present, or None where there is none left.

        kind: it must be of this one. barred: labels, kinds and families it must not have.
        """
        for position in rng.permutation(len(self.companions)):
            item = self.companions[position]
            if kind is not None and item.kind.name != kind:
                continue
            if item in present or not barred.isdisjoint((item.label, item.kind.name, item.kind.family)):
                continue
            if self._may_join(item, present):
                return item
        return None

    def _may_join(self, item: Identity, present: list[Identity]) -> bool:
        """`present[0]` is the target. In `test_combination` the target's pairs are all ones that training never saw."""
        if self.split == "test_combination":
            return _held_out(item.label, present[0].label)
        return not any(_held_out(item.label, other.label) for other in present)

    def _num_partners(self, target: Identity) -> int:
        return sum(item is not target and self._may_join(item, [target]) for item in self.companions)


_held_out = cache(roles.is_held_out_pair)


def _choose(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]


def _shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    return [items[position] for position in rng.permutation(len(items))]
