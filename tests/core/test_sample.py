import json
from typing import Any

import pytest

from samtrain.core.errors import DataError
from samtrain.core.sample import ImageRef, SampleRecord

RECORD = SampleRecord(
    key="k1",
    task="counting",
    instruction="<image> and <image>: how many?",
    output="zwölf",
    images=(ImageRef("k1.0.jpg", 10, 20, "aa"), ImageRef("k1.1.png", 30, 40, "bb")),
    source="somewhere",
    meta={"style": "noto", "nested": [1, {"a": None}]},
)


def values(**changes: Any) -> str:
    return json.dumps({**json.loads(RECORD.to_json()), **changes})


def test_a_record_survives_json() -> None:
    assert SampleRecord.from_json(RECORD.to_json(), where="x") == RECORD
    assert SampleRecord.from_json(RECORD.to_json().encode(), where="x") == RECORD


def test_source_and_meta_may_be_absent() -> None:
    text = json.dumps({k: v for k, v in json.loads(RECORD.to_json()).items() if k not in ("source", "meta")})
    assert SampleRecord.from_json(text, where="x").meta == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a sample record"),
        ("[]", "not a sample record"),
        (values(unknown=1), "unexpected keyword argument 'unknown'"),
        (values(images=3), "not a sample record"),
        (values(images=[{"file": "a"}]), "not a sample record"),
        (values(output=None), "`output` is None, expected text"),
        (values(key=7), "`key` is 7, expected text"),
        (values(instruction="<image> only one"), "k1: .* 1 <image> placeholders but the sample has 2 images"),
    ],
)
def test_a_wrong_record_is_an_error_that_says_where_and_what(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"shard-3.tar.*{message}"):
        SampleRecord.from_json(text, where="shard-3.tar")


def test_an_instruction_without_placeholders_is_the_prefix_layout() -> None:
    assert SampleRecord.from_json(values(instruction="how many?"), where="x").instruction == "how many?"


def test_a_missing_field_is_an_error() -> None:
    text = json.dumps({k: v for k, v in json.loads(RECORD.to_json()).items() if k != "task"})
    with pytest.raises(DataError, match="task"):
        SampleRecord.from_json(text, where="x")
