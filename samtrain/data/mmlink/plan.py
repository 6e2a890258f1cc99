"""Who appears in which sample: decided from names and hashes alone, before anything is drawn.

A plan of a sample is a function of (seed, split, domain, number) and of what the sources offer. Every identity serves
as A about equally often. All things of a sample are of its split, so an identity is seen in one split alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from samtrain.core.errors import DataError
from samtrain.core.seeds import derive_seed
from samtrain.data.mmlink.options import COVERS, DOMAINS, ICONS, OBJECTS, BuildOptions
from samtrain.data.mmlink.pictures import bits_apart
from samtrain.data.mmlink.records import (
    BACKGROUND,
    COVER,
    ICON,
    OBJECT,
    SourcePicture,
    content_words,
    head_word,
    split_of,
)

T = TypeVar("T")
_PICKS = 200  # tries for a neighbour that is unlike the rest
_ALIKE_BITS = 6  # things whose shapes differ in fewer of 64 bits are not put into one sample
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Usable:
    """A source picture that can be used. key, ref: of its cut-out (object, icon), plate (background), page (cover)."""

    picture: SourcePicture
    key: str
    ref: str
    shape: str = ""  # perceptual hash of the cut-out


@dataclass(frozen=True)
class Thing:
    """One thing on a canvas, JSON-able."""

    picture: str
    identity: str
    name: str
    category: str
    pose: str
    source: str
    plural: bool
    mirror: bool
    key: str
    ref: str
    caption: str


@dataclass(frozen=True)
class Plan:
    """One sample. canvases: the things of each picture, A first (icons: in the order of the grid's cells).

    targets: number of A on each canvas. common: what covers share. seed: of everything drawn for it.
    """

    key: str
    split: str
    domain: str
    number: int
    seed: int
    canvases: tuple[tuple[Thing, ...], ...]
    targets: tuple[int, ...]
    grid: int = 0
    common: dict[str, str] = field(default_factory=dict)

    @property
    def target(self) -> Thing:
        return self.canvases[0][self.targets[0]]

    def target_on(self, canvas: int) -> Thing:
        return self.canvases[canvas][self.targets[canvas]]


class Catalog:
    """What the sources offer, by split."""

    def __init__(self, usable: Sequence[Usable], options: BuildOptions) -> None:
        self.options = options
        self.shares = {name: share for name, share in options.splits.model_dump().items() if share > 0}
        self.by_role: dict[str, dict[str, dict[str, list[Usable]]]] = {}  # role -> split -> identity -> pictures
        self.same_poses = 0
        groups: dict[str, str] = {}  # identity -> what its split goes by; views of one thing may be named differently
        for item in usable:
            picture = item.picture
            group = picture.identity if picture.role in (COVER, BACKGROUND) else head_word(picture.name)
            split = split_of(groups.setdefault(picture.identity, group), self.shares)
            pictures = self.by_role.setdefault(picture.role, {}).setdefault(split, {}).setdefault(picture.identity, [])
            if self._is_same_pose(item, pictures):
                self.same_poses += 1
            else:
                pictures.append(item)
        self.works = [work for split in self.by_role.get(COVER, {}).values() for work in split.values()]

    def identities(self, role: str, split: str) -> dict[str, list[Usable]]:
        return self.by_role.get(role, {}).get(split, {})

    def backgrounds(self, split: str) -> list[Usable]:
        """Of that split; of all where it has none."""
        own = self.by_role.get(BACKGROUND, {})
        chosen = own.get(split) or {name: items for part in own.values() for name, items in part.items()}
        return [item for items in chosen.values() for item in items]

    def facts(self) -> dict[str, Any]:
        """Identities by role and split, for the report."""
        return {
            role: {split: len(identities) for split, identities in sorted(splits.items())}
            for role, splits in sorted(self.by_role.items())
        }

    def _is_same_pose(self, item: Usable, others: list[Usable]) -> bool:
        bits = self.options.filters.pose_bits
        if bits is None or item.picture.role != OBJECT or not item.shape:
            return False
        return any(bits_apart(item.shape, other.shape) <= bits for other in others if other.shape)


def wanted_counts(options: BuildOptions) -> dict[tuple[str, str], int]:
    """(split, domain) -> samples. Sums to `num_samples`: rest by largest remainder."""
    domains, splits = options.domains.model_dump(), options.splits.model_dump()
    total = sum(domains.values()) * sum(splits.values())
    exact = {
        (split, domain): options.num_samples * splits[split] * domains[domain] / total
        for split in SPLITS
        for domain in DOMAINS
    }
    counts = {cell: int(value) for cell, value in exact.items()}
    by_rest = sorted(exact, key=lambda cell: (counts[cell] - exact[cell], cell))
    for cell in by_rest[: options.num_samples - sum(counts.values())]:
        counts[cell] += 1
    return {cell: count for cell, count in counts.items() if count}


def make_plans(catalog: Catalog, options: BuildOptions) -> list[Plan]:
    """All plans, more than are wanted by `oversample`.

    Raises:
        DataError: a domain has not enough sources for a split; says what there is and what to do.
    """
    plans = []
    for (split, domain), count in wanted_counts(options).items():
        planner = _PLANNERS[domain](catalog, split, options)
        planned = int(np.ceil(count * options.oversample)) + (2 if options.oversample > 1 else 0)
        plans += [planner.plan(number) for number in range(planned)]
    return plans


class _Planner:
    """What planners of all domains share."""

    domain = ""

    def __init__(self, catalog: Catalog, split: str, options: BuildOptions) -> None:
        self.catalog, self.split, self.options = catalog, split, options

    def rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng(self.seed(number))

    def seed(self, number: int) -> int:
        return derive_seed("mmlink", self.options.seed, self.split, self.domain, number)

    def in_turn(self, items: Sequence[T], number: int) -> T:
        """Each of `items` once before any of them again, in an order that changes every round."""
        turn, place = divmod(number, len(items))
        order = np.random.default_rng(derive_seed("mmlink turn", self.options.seed, self.split, self.domain, turn))
        return items[int(order.permutation(len(items))[place])]

    def finished(self, number: int, **values: Any) -> Plan:
        key = f"{self.split}-{self.domain}-{number:06d}"
        return Plan(key=key, split=self.split, domain=self.domain, number=number, seed=self.seed(number), **values)

    def lacking(self, found: str, needed: str) -> DataError:
        return DataError(
            f"the split {self.split} has {found}, and {self.domain} need {needed}; add sources, or set "
            f"domains.{self.domain} or splits.{self.split} to 0"
        )


class ObjectPlanner(_Planner):
    """A in several poses, each beside things that appear once."""

    domain = OBJECTS

    def __init__(self, catalog: Catalog, split: str, options: BuildOptions) -> None:
        super().__init__(catalog, split, options)
        identities = catalog.identities(OBJECT, split)
        few, _ = options.compose.num_images
        self.targets = [items for _, items in sorted(identities.items()) if len(items) >= few]
        self.companions = [items for _, items in sorted(identities.items())]
        needed = few * options.compose.num_distractors[0] + 1
        if not self.targets or len(self.companions) < needed:
            raise self.lacking(
                f"{len(self.targets)} things in {few} or more poses and {len(self.companions)} things in all",
                f"at least 1 and {needed}",
            )

    def plan(self, number: int) -> Plan:
        rng = self.rng(number)
        poses = self.in_turn(self.targets, number)
        few, many = self.options.compose.num_images
        num_images = int(rng.integers(few, min(many, len(poses)) + 1))
        shown = [poses[int(i)] for i in rng.permutation(len(poses))[:num_images]]
        present = [shown[0]]
        canvases = []
        for target in shown:
            low, high = self.options.compose.num_distractors
            neighbours = []
            for _ in range(int(rng.integers(low, high + 1))):
                found = pick_unlike(self.companions, present, rng)
                if found is not None:
                    present.append(found)
                    neighbours.append(found)
            if not neighbours:
                raise self.lacking("no further thing that is unlike those of a sample", "things of more kinds")
            canvases.append(tuple(_thing(item) for item in (target, *neighbours)))
        return self.finished(number, canvases=tuple(canvases), targets=(0,) * num_images)


class IconPlanner(_Planner):
    """Grids of icons of one style each, of which one is in all of them."""

    domain = ICONS

    def __init__(self, catalog: Catalog, split: str, options: BuildOptions) -> None:
        super().__init__(catalog, split, options)
        self.icons = [items for _, items in sorted(catalog.identities(ICON, split).items())]
        self.needed = 2 * (options.compose.grid[0] ** 2 - 1) + 1
        if len(self.icons) < self.needed:
            raise self.lacking(f"{len(self.icons)} icons", f"at least {self.needed}")

    def plan(self, number: int) -> Plan:
        rng = self.rng(number)
        target = self.in_turn(self.icons, number)
        low, high = self.options.compose.grid
        others = self._others(target, 2 * (high * high - 1), rng)
        sides = [side for side in range(low, high + 1) if 2 * (side * side - 1) <= len(others)]
        if not sides:
            raise self.lacking(f"{len(others)} icons unlike {target[0].picture.name} by name", f"{self.needed - 1}")
        side = sides[int(rng.integers(len(sides)))]
        same_style = rng.random() < 0.5
        first = target[int(rng.integers(len(target)))]
        second = first if same_style else target[int(rng.integers(len(target)))]
        count = side * side - 1
        canvases, targets = [], []
        for shown, beside in zip((first, second), (others[:count], others[count : 2 * count])):
            cells = [_in_style(items, shown.picture.pose, rng) for items in beside]
            place = int(rng.integers(side * side))
            cells.insert(place, shown)
            canvases.append(tuple(_thing(item) for item in cells))
            targets.append(place)
        return self.finished(number, canvases=tuple(canvases), targets=tuple(targets), grid=side)

    def _others(self, target: list[Usable], most: int, rng: np.random.Generator) -> list[list[Usable]]:
        """Icons of which no two, and none with the target, share a word: a boat and a motor boat would be one too."""
        words = set(content_words(target[0].picture.name))
        found: list[list[Usable]] = []
        for i in rng.permutation(len(self.icons)):
            items = self.icons[int(i)]
            named = content_words(items[0].picture.name)
            if items is not target and not named & words:
                found.append(items)
                words |= named
                if len(found) == most:
                    break
        return found


class CoverPlanner(_Planner):
    """Two covers as they are, of different books that share an author, a genre, or both."""

    domain = COVERS

    def __init__(self, catalog: Catalog, split: str, options: BuildOptions) -> None:
        super().__init__(catalog, split, options)
        covers = [item for items in catalog.identities(COVER, split).values() for item in items]
        self.groups: list[tuple[str, list[Usable]]] = []
        for what in ("author", "genre"):
            values = sorted({item.picture.facts[what] for item in covers if item.picture.facts.get(what)})
            for value in values:
                members = [item for item in covers if item.picture.facts.get(what) == value]
                if len({_title(item) for item in members}) >= 2:
                    self.groups.append((what, members))
        if not self.groups:
            raise self.lacking(f"{len(covers)} covers", "two books of one author or genre")

    def plan(self, number: int) -> Plan:
        rng = self.rng(number)
        _, members = self.in_turn(self.groups, number)
        first = members[int(rng.integers(len(members)))]
        others = [item for item in members if _title(item) != _title(first)]
        second = others[int(rng.integers(len(others)))]
        both = first.picture.facts, second.picture.facts
        common = {what: both[0][what] for what in ("author", "genre") if both[0].get(what) == both[1].get(what) != ""}
        common = {what: value for what, value in common.items() if value}
        return self.finished(number, canvases=((_thing(first),), (_thing(second),)), targets=(0, 0), common=common)


_PLANNERS: dict[str, type[ObjectPlanner] | type[IconPlanner] | type[CoverPlanner]] = {
    OBJECTS: ObjectPlanner,
    ICONS: IconPlanner,
    COVERS: CoverPlanner,
}


def pick_unlike(
    companions: Sequence[list[Usable]], present: Sequence[Usable], rng: np.random.Generator
) -> Usable | None:
    """A thing that shares no word of its name and no shape with those present: the answer must be the only one."""
    taken = {item.picture.identity for item in present}
    words = set().union(*(content_words(item.picture.name) for item in present))
    for _ in range(_PICKS):
        pictures = companions[int(rng.integers(len(companions)))]
        item = pictures[int(rng.integers(len(pictures)))]
        if item.picture.identity in taken or content_words(item.picture.name) & words:
            continue
        if any(item.shape and other.shape and bits_apart(item.shape, other.shape) < _ALIKE_BITS for other in present):
            continue
        return item
    return None


def _in_style(pictures: list[Usable], style: str, rng: np.random.Generator) -> Usable:
    """The picture in that style where there is one."""
    same = [item for item in pictures if item.picture.pose == style]
    return same[0] if same else pictures[int(rng.integers(len(pictures)))]


def _title(item: Usable) -> str:
    return str(item.picture.facts.get("title") or item.picture.id)


def _thing(item: Usable) -> Thing:
    picture = item.picture
    return Thing(
        picture=picture.id,
        identity=picture.identity,
        name=picture.name,
        category=picture.category,
        pose=picture.pose,
        source=picture.source,
        plural=bool(picture.facts.get("plural", False)),
        mirror=bool(picture.facts.get("mirror", True)),
        key=item.key,
        ref=item.ref,
        caption=picture.caption,
    )


def thing_row(thing: Thing) -> dict[str, Any]:
    """What the record says of a thing."""
    row = asdict(thing)
    return {name: row[name] for name in ("picture", "identity", "name", "category", "pose", "source")}
