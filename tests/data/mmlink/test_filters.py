"""What is not kept, and that nothing alike is missed."""

from typing import Any

import numpy as np
import pytest

from samtrain.data.mmlink.filters import Finished, NearDuplicates, reason_against
from samtrain.data.mmlink.options import FilterOptions
from samtrain.data.mmlink.pictures import bits_apart
from samtrain.data.mmlink.plan import Plan, Thing


def sample(*, domain: str = "objects", common: dict[str, str] | None = None, **changes: Any) -> Finished:
    fox = Thing("p", "fox", "a red fox", "animal", "0", "s", False, True, "k", "r", "")
    plan = Plan("key", "train", domain, 0, 1, ((fox,), (fox,)), (0, 0), 0, common or {})
    values: dict[str, Any] = {"instruction": "What is shared?", "answer": "A red fox.", "contrasts": (40.0, 30.0)}
    return Finished(plan, **values | {"hashes": ("0" * 16, "f" * 16)} | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"answer": "Fox."}, "length of the answer"),
        ({"answer": "fox " * 81}, "length of the answer"),
        ({"instruction": ""}, "length of the instruction"),
        ({"instruction": "See <image> here"}, "placeholder"),
        ({"answer": "I'm sorry, I see no fox."}, "refusal"),
        ({"answer": "It is a blue bus."}, "does not name"),
        ({"answer": "The foxes, of course."}, "does not name"),  # "foxes" is no word of its name; better left out
        ({"contrasts": (40.0, 3.0)}, "hardly stands out"),
        ({"contrasts": ()}, None),
    ],
)
def test_reasons(changes: dict[str, Any], reason: str | None) -> None:
    found = reason_against(sample(**changes), FilterOptions())
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_answers_about_covers_name_what_is_shared() -> None:
    common = {"author": "Jane Austen"}
    assert (
        reason_against(sample(domain="covers", common=common, answer="Both are by Jane Austen."), FilterOptions())
        is None
    )
    assert reason_against(sample(domain="covers", common=common, answer="Both are old books."), FilterOptions())


@pytest.mark.parametrize("bits", [0, 3, 7])
def test_near_duplicates_are_those_that_comparing_all_finds(bits: int) -> None:
    rng = np.random.default_rng(bits)
    base = [int.from_bytes(rng.bytes(8), "big") for _ in range(40)]
    hashes = []
    for _ in range(400):
        pair = []
        for value in (base[int(rng.integers(40))], base[int(rng.integers(3))]):
            flips = sum(1 << int(bit) for bit in rng.permutation(64)[: int(rng.integers(0, 10))])
            pair.append(f"{value ^ flips:016x}")
        hashes.append(tuple(pair))
    found = NearDuplicates(bits)
    for number, pair in enumerate(hashes):
        expected = any(
            all(bits_apart(one, other) <= bits for one, other in zip(pair, hashes[earlier]))
            for earlier in range(number)
        )
        assert (found.find(pair) is not None) == expected
        found.add(str(number), pair)


def test_samples_of_other_numbers_of_pictures_are_never_duplicates() -> None:
    found = NearDuplicates(4)
    found.add("two", ("0" * 16, "0" * 16))
    assert found.find(("0" * 16,) * 3) is None and found.find(("0" * 16,) * 2) == "two"
