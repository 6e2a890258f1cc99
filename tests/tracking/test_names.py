import pytest
from mlflow.utils.validation import _validate_metric_name

from samtrain.core.errors import ConfigError
from samtrain.tracking.names import flatten, safe_artifact_file, safe_keys, safe_name


@pytest.mark.parametrize(
    "name",
    ["train/loss", "eval/test_style.link/cider", "größe (GiB)", "/a//b/", "../x", "..", "", "a" * 300, "x/./y", "日本"],
)
def test_every_name_becomes_one_that_mlflow_takes(name):
    _validate_metric_name(safe_name(name))
    assert len(safe_name(name)) <= 250


def test_good_names_stay():
    assert safe_name("eval/test_style.link/cider") == "eval/test_style.link/cider"


def test_no_value_hides_another():
    assert safe_keys({"a b": 1, "a_b": 2, "a(b": 3}) == {"a_b": 1, "a_b_2": 2, "a_b_3": 3}
    long = {"x" * 260: 1, "x" * 270: 2}
    assert len(safe_keys(long)) == 2 and max(map(len, safe_keys(long))) <= 250


def test_nested_settings_become_dotted():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1], "f": {}}) == {
        "a.b": "1",
        "a.c.d": "None",
        "e": "[1]",
        "f": "{}",
    }


@pytest.mark.parametrize("path", ["", ".", "..", "/etc/x", "../x", "a/../../x", "a\\b"])
def test_artifacts_stay_inside_the_run(path):
    with pytest.raises(ConfigError, match="artifact path"):
        safe_artifact_file(path)
