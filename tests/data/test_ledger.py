import json

import pytest

from samtrain.core.errors import CheckpointError
from samtrain.data.ledger import Ledger

STEPS = [(["a", "b"], {}), (["c", "d"], {"d": "damaged"}), (["e", "f"], {}), (["g", "a"], {})]


def write(path, steps, start=0, **options):
    with Ledger.open(path, **options) as ledger:
        for i, (keys, skipped) in enumerate(steps, start=start + 1):
            ledger.record(i, keys, skipped)
        return ledger.digest


def test_lines_list_used_and_skipped_keys(tmp_path):
    digest = write(tmp_path / "run" / "ledger.jsonl", STEPS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["keys"] == ["c"] and lines[1]["skipped"] == {"d": "damaged"}
    assert lines[-1]["digest"] == digest


def test_equal_histories_have_equal_hashes(tmp_path):
    assert write(tmp_path / "a", STEPS) == write(tmp_path / "b", STEPS)


@pytest.mark.parametrize(
    "other",
    [
        STEPS[:3],
        [STEPS[1], STEPS[0], *STEPS[2:]],
        [(["b", "a"], {}), *STEPS[1:]],
        [STEPS[0], (["c", "d"], {}), *STEPS[2:]],
        [STEPS[0], (["c", "d"], {"c": "damaged"}), *STEPS[2:]],
        [(["a"], {}), (["b", "c", "d"], {"d": "damaged"}), *STEPS[2:]],
    ],
)
def test_any_other_history_has_another_hash(tmp_path, other):
    assert write(tmp_path / "a", STEPS) != write(tmp_path / "b", other)


def test_reasons_may_differ_between_machines(tmp_path):
    other = [STEPS[0], (["c", "d"], {"d": "/other/path: damaged"}), *STEPS[2:]]
    assert write(tmp_path / "a", STEPS) == write(tmp_path / "b", other)


def test_a_resumed_ledger_equals_an_uninterrupted_one_byte_for_byte(tmp_path):
    whole = write(tmp_path / "a", STEPS)
    write(tmp_path / "b", [*STEPS[:2], (["not", "kept"], {})])
    assert write(tmp_path / "b", STEPS[2:], start=2, resume_step=2) == whole
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_torn_last_line_after_the_checkpoint_does_not_matter(tmp_path):
    whole = write(tmp_path / "a", STEPS)
    write(tmp_path / "b", STEPS[:2])
    with open(tmp_path / "b", "ab") as stream:
        stream.write(b'{"step": 3, "keys": ["e"')
    assert write(tmp_path / "b", STEPS[2:], start=2, resume_step=2) == whole


def test_a_fresh_start_begins_an_empty_ledger(tmp_path):
    write(tmp_path / "a", STEPS)
    with Ledger.open(tmp_path / "a") as ledger:
        assert ledger.step == 0
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.parametrize("content", ["missing", "short", "torn", "no newline"])
def test_a_ledger_that_lacks_the_resumed_step_is_refused(tmp_path, content):
    path = tmp_path / "a"
    if content != "missing":
        write(path, STEPS[:2])
    cut = {"torn": 10, "no newline": 1}.get(content, 0)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="missing"):
        Ledger.open(path, resume_step=2 if cut else 3)
    assert path.exists() == (content != "missing")


def test_a_changed_key_is_noticed_on_resume(tmp_path):
    write(tmp_path / "a", STEPS)
    (tmp_path / "a").write_text((tmp_path / "a").read_text().replace('"e"', '"z"'))
    with pytest.raises(CheckpointError, match="step 3"):
        Ledger.open(tmp_path / "a", resume_step=4)


def test_a_step_cannot_be_left_out_or_recorded_twice(tmp_path):
    with Ledger.open(tmp_path / "a") as ledger:
        ledger.record(1, ["a"], {})
        for step in (1, 3):
            with pytest.raises(ValueError, match="recorded once"):
                ledger.record(step, ["b"], {})


def test_lines_are_on_disk_as_soon_as_they_are_recorded(tmp_path):
    with Ledger.open(tmp_path / "a") as ledger:
        ledger.record(1, ["é"], {})
        assert json.loads((tmp_path / "a").read_text())["keys"] == ["é"]
