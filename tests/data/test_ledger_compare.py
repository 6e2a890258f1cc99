import json

import pytest

from samtrain.core.errors import DataError
from samtrain.data.ledger import Ledger
from samtrain.data.ledger_compare import compare_ledgers

STEPS = [(["a", "b"], {}), (["c", "d"], {"d": "damaged"}), (["e", "f"], {}), (["g", "a"], {})]


def write(path, steps, **shards):
    path.parent.mkdir(parents=True, exist_ok=True)
    with Ledger.open(path) as ledger:
        for i, (keys, skipped) in enumerate(steps, 1):
            ledger.record(i, keys, skipped, quarantined=shards if i == 2 else None)
    return path


@pytest.fixture
def compare(tmp_path):
    def run(steps):
        return compare_ledgers(write(tmp_path / "a" / "ledger.jsonl", STEPS), write(tmp_path / "b.jsonl", steps))

    return run


def test_equal_histories_are_equal_with_their_sums(compare):
    found = compare([STEPS[0], (["c", "d"], {"d": "other words"}), *STEPS[2:]])
    assert found.is_equal and found.equal_steps == 4 and found.a.digest == found.b.digest
    assert (found.a.steps, found.a.used, found.a.skipped) == (4, 7, 1)


@pytest.mark.parametrize(
    ("steps", "step", "what", "only_a", "only_b"),
    [
        ([STEPS[0], STEPS[2], STEPS[1], STEPS[3]], 2, "no key is the same", ["c"], ["e", "f"]),
        ([(["b", "a"], {}), *STEPS[1:]], 1, "the same keys in another order", [], []),
        ([STEPS[0], (["c", "d"], {}), *STEPS[2:]], 2, "one skipped what the other used", [], ["d"]),
        ([STEPS[0], (["c", "x"], {"x": "?"}), *STEPS[2:]], 2, "the same keys are used, others are skipped", [], []),
        ([*STEPS[:2], (["e", "z"], {}), STEPS[3]], 3, "some keys differ", ["f"], ["z"]),
        (STEPS[:3], 4, "B ends before it", [], []),
        ([*STEPS, (["h"], {})], 5, "A ends before it", [], []),
        ([], 1, "B ends before it", [], []),
    ],
)
def test_the_first_step_that_differs_is_found_with_both_sides(compare, steps, step, what, only_a, only_b):
    found = compare(steps)
    assert not found.is_equal and found.equal_steps == step - 1
    assert (found.difference.step, found.difference.what) == (step, what)
    assert (found.difference.only_a, found.difference.only_b) == (only_a, only_b)
    assert (found.a.digest == found.b.digest) is False
    assert found.b.steps == len(steps) and found.b.used == sum(len(k) - len(s) for k, s in steps)


def test_quarantined_shards_are_shown(tmp_path):
    write(tmp_path / "ledger.jsonl", STEPS, **{"shard-000007.tar": "cut off"})
    found = compare_ledgers(tmp_path, tmp_path / "ledger.jsonl")
    assert found.is_equal and found.a.quarantined == {"shard-000007.tar": "cut off"}


def test_a_line_that_was_never_finished_is_left_out_and_told(tmp_path):
    write(tmp_path / "a", STEPS[:2])
    write(tmp_path / "b", STEPS)
    text = (tmp_path / "b").read_text().splitlines(keepends=True)
    (tmp_path / "b").write_text("".join(text[:2]) + text[2][:15])
    found = compare_ledgers(tmp_path / "a", tmp_path / "b")
    assert found.is_equal and found.b.is_torn and not found.a.is_torn


@pytest.mark.parametrize("edit", [('"e"', '"z"'), ('"step": 3', '"step": 4'), ('{"step": 3', '["step": 3')])
def test_an_edited_ledger_is_refused_with_its_name_and_step(tmp_path, edit):
    write(tmp_path / "a", STEPS)
    write(tmp_path / "b", STEPS)
    (tmp_path / "b").write_text((tmp_path / "b").read_text().replace(*edit))
    with pytest.raises(DataError, match=r"b: .*step 3.*cut or edited"):
        compare_ledgers(tmp_path / "a", tmp_path / "b")


def test_the_command_exits_0_1_and_2(tmp_path, run_cli):
    for name, steps in (("a", STEPS), ("b", STEPS), ("c", [*STEPS[:2], (["other", "f"], {}), STEPS[3]])):
        write(tmp_path / name / "ledger.jsonl", steps)
    code, out, _ = run_cli("ledger", tmp_path / "a", tmp_path / "b")
    assert code == 0 and "equal: 4 steps, digest" in out
    code, out, _ = run_cli("ledger", tmp_path / "a", tmp_path / "c", "--json", tmp_path / "report.json")
    assert code == 1 and "different from step 3 on" in out and "other" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["equal"] is False and report["difference"]["only_b"] == ["other"] and report["b"]["steps"] == 4
    code, out, _ = run_cli("ledger", tmp_path / "a", write(tmp_path / "d", STEPS[:1]))
    assert code == 1 and "has 3 more" in out
    for arguments in ((tmp_path / "a", tmp_path / "nowhere"), (tmp_path / "a", tmp_path), (tmp_path / "a",)):
        code, _, err = run_cli("ledger", *arguments)
        assert code == 2 and err and "Traceback" not in err
