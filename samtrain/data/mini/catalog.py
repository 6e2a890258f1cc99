"""Which thing plays which role: the identities of a build, and what training never sees.

Three things are held out, each by a hash that no option changes:
  identities: of every kind 70 % are trained on, 10 % are for validation, 20 % for `test_identity`;
  styles: `HELD_OUT_STYLES` appear in `test_style` alone;
  combinations: a fifth of all pairs of things never share a picture except in `test_combination`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from samtrain.core.errors import DataError
from samtrain.data.mini.art import Stock
from samtrain.data.mini.sources import STYLE_PACKAGES
from samtrain.data.mini.vocabulary import KINDS, Kind, stable_fraction

HELD_OUT_STYLES = ("fluent-emoji-flat", "noto-v1")
TRAIN_STYLES = tuple(style for style in STYLE_PACKAGES if style not in HELD_OUT_STYLES)
TRAIN, VALIDATION, TEST = "train", "validation", "test"
MIN_IDENTITIES = 24
_MIN_STYLES = 3
_HELD_OUT_PAIRS = 0.2


@dataclass(frozen=True)
class Identity:
    """One nameable thing. `role`: the split its kind of holding-out belongs to."""

    label: str
    kind: Kind
    role: str
    styles: tuple[str, ...]

    def styles_in(self, allowed: Iterable[str]) -> list[str]:
        """Its styles that are also in `allowed`, in a fixed order."""
        return [style for style in self.styles if style in allowed]


def build_catalog(stock: Stock, *, max_identities: int | None) -> tuple[Identity, ...]:
    """The identities of a build, in a fixed order, with their roles.

    Raises:
        DataError: too few identities to compose samples and to hold some out.
    """
    if max_identities is not None and max_identities < MIN_IDENTITIES:
        raise DataError(
            f"data.mini.max_identities = {max_identities}: splits that hold identities and combinations out need "
            f"at least {MIN_IDENTITIES}; raise it, or set it to null for all"
        )
    kept = [
        (kind, [(label, stock.styles(label)) for label in kind.labels if len(stock.styles(label)) >= _MIN_STYLES])
        for kind in KINDS
    ]
    if max_identities is not None:
        kept = _limit(kept, max_identities)
    identities = []
    for kind, members in kept:
        by_hash = sorted(members, key=lambda member: stable_fraction("identity", member[0]))
        num_test, num_validation = round(0.2 * len(by_hash)), round(0.1 * len(by_hash))
        for position, (label, styles) in enumerate(by_hash):
            role = TEST if position < num_test else VALIDATION if position < num_test + num_validation else TRAIN
            identities.append(Identity(label, kind, role, styles))
    return tuple(identities)


def is_held_out_pair(one: str, other: str) -> bool:
    """Whether these two never share a picture in training."""
    return stable_fraction("pair", *sorted((one, other))) < _HELD_OUT_PAIRS


_Members = list[tuple[str, tuple[str, ...]]]


def _limit(kept: list[tuple[Kind, _Members]], max_identities: int) -> list[tuple[Kind, _Members]]:
    """Few kinds with enough members each, rather than many with one; best-drawn members first.

    `KINDS` is ordered so that its first three kinds are an animal, a vehicle and another; every further ten
    identities open one more kind.
    """
    named = [(kind, members) for kind, members in kept if kind.name]
    num_kinds = min(len(named), max(3, max_identities // 10))
    chosen = [
        (kind, sorted(members, key=lambda member: (-len(member[1]), stable_fraction("limit", member[0]))))
        for kind, members in (named[:num_kinds] if num_kinds < len(named) else kept)
    ]
    taken = [0] * len(chosen)
    while sum(taken) < max_identities and any(taken[i] < len(chosen[i][1]) for i in range(len(chosen))):
        for i, (_, members) in enumerate(chosen):
            if taken[i] < len(members) and sum(taken) < max_identities:
                taken[i] += 1
    return [(kind, members[:count]) for (kind, members), count in zip(chosen, taken)]
