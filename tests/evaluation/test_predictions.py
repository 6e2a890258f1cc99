import json

import pytest
from rich.console import Console

from samtrain.core.errors import InputError
from samtrain.evaluation.metrics import score_directory
from samtrain.evaluation.predictions import read_predictions, write_predictions
from samtrain.evaluation.report import score_rows, scores_table


def row(index, prediction="a cat", reference="a cat", **extra):
    return {"sample_id": index, "pred_response": prediction, "gt_response": reference, **extra}


def test_every_set_of_the_authors_layout_is_scored(tmp_path):
    write_predictions(tmp_path, "VIST", [row(0), row(1, "a dog ran home", "a dog ran home"), row(2, ".")])
    write_predictions(tmp_path, "AESOP", [row(0), row(1, "wrong", "the sun sets")])
    (tmp_path / "notes").mkdir()
    scores = score_directory(tmp_path)
    assert list(scores) == ["AESOP", "VIST"]
    assert scores["AESOP"].rouge_l == 50.0 and scores["VIST"].rouge_l == 66.67
    assert score_directory(tmp_path / "VIST") == {"VIST": scores["VIST"]}
    assert json.loads(json.dumps(scores["VIST"].to_dict()))["num_empty_predictions"] == 1


def test_the_table_breaks_down_by_images_and_explains_empty_predictions(tmp_path):
    rows = [row(i, num_images=2 + i % 2) for i in range(4)] + [row(9, "", "a dog", num_images=2)]
    write_predictions(tmp_path, "test_style.link", rows)
    scores = score_directory(tmp_path)
    assert [r[:3] for r in score_rows(scores)] == [["test_style.link", "all", "5"], ["", "2", "3"], ["", "3", "2"]]
    console = Console(width=120, record=True)
    console.print(scores_table(scores))
    text = console.export_text()
    assert "1 empty predictions count 0" in text and "majority" not in text
    assert scores_table(scores, majority=scores).columns[-1].header == "CIDEr majority"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON in UTF-8"),
        ("{}", "expected a list of predictions, found dict"),
        ("[]", "holds no predictions"),
        ("[1]", "index 0: expected an object, found int"),
        (json.dumps([row(0), {"sample_id": 1, "pred_response": "x"}]), "index 1: no `gt_response`"),
        (json.dumps([row(0), row(0)]), "index 1: `sample_id` 0 stands at index 0 already"),
        (json.dumps([row(0, None)]), "index 0: `pred_response` = None, expected text"),
        (json.dumps([row(0), row(7, "x", " . ")]), r"index 1 \(sample_id 7\): the reference `gt_response`"),
        (json.dumps([row([1])]), r"index 0: `sample_id` = \[1\]"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_file_is_named_with_index_and_key(tmp_path, content, message):
    path = tmp_path / "pred.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_predictions(path)
    assert str(path) in str(error.value)


def test_folders_without_predictions_say_what_is_expected(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        score_directory(tmp_path / "absent")
    with pytest.raises(InputError, match=r"<SET>/pred\.json"):
        score_directory(tmp_path)


def test_rows_without_a_key_are_not_written(tmp_path):
    with pytest.raises(InputError, match="row 0 has no `gt_response`"):
        write_predictions(tmp_path, "S", [{"sample_id": 0, "pred_response": ""}])
    assert not (tmp_path / "S").exists()
