"""A configuration is right as a whole or one message says what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.config import load_config
from samtrain.data.mmlink.options import parse_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sample": 3}, "unknown key `num_sample`; did you mean `num_samples`?"),
        ({"segmnt": {"kind": "sam"}}, "unknown key `segmnt`; did you mean `segment`?"),
        ({"compose": {"canvass": 3}}, "unknown key `compose.canvass`; did you mean `canvas`?"),
        ({"segment": {"kind": "u2nett"}}, "unknown kind 'u2nett'; did you mean `u2net`?"),
        ({"segment": {"kind": "sam", "modle": "x"}}, "segment (sam): unknown key `modle`; did you mean `model`?"),
        ({"segment": {"kind": "sam", "refine": True}}, "segment (sam): unknown key `refine`"),
        ({"fill": {"model": "x"}}, "fill: expected a mapping with `kind: generated | photographs"),
        ({"sources": []}, "`sources` is a list of at least one"),
        ({"sources": [{"kind": "foldr", "path": "."}]}, "sources[0]: unknown kind 'foldr'; did you mean `folder`?"),
        ({"sources": [{"kind": "folder"}]}, "sources[0] (folder): `path` is required and missing"),
        ({"num_samples": "8"}, "`num_samples` = '8'"),
        ({"compose": {"num_images": [1, 2]}}, "num_images = [1, 2]: expected 2 <="),
        ({"domains": {"objects": 0, "icons": 0, "covers": 0}}, "at least one must not be"),
        ({"writer": {"kind": "openai", "base_url": "ftp://x", "model": "m"}}, "expected http://"),
        ({"writer": {"kind": "openai", "base_url": "http://x", "model": "m", "budget_cost": 1.0}}, "budget_cost needs"),
        ({"execution": {"stages": {"segment": {"gpus": 1}}}}, "did you mean `num_gpus`?"),
    ],
)
def test_mistakes_are_named_with_the_way_out(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values | change, source="my.yaml")
    assert message in str(caught.value) and str(caught.value).startswith("my.yaml")


def test_overrides_reach_sections_and_items_of_lists(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(path, ["num_samples=7", "compose.canvas=64", "sources.0.category=tool", "segment.kind=alpha"])
    assert (config.build.num_samples, config.build.compose.canvas) == (7, 64)
    assert config.sources[0].options.model_dump()["category"] == "tool"
    assert config.segment.kind == "alpha"
    for override, message in {
        "num_samples": "write key=value",
        "sources.9.path=x": "`9` is not the number of one of 4 items",
        "num_samples.x=1": "is a value, not a section",
        "seed=[": "not valid YAML",
    }.items():
        with pytest.raises(ConfigError, match="override") as caught:
            load_config(path, [override])
        assert message in str(caught.value)


def test_a_key_given_twice_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("output: a\noutput: b\n")
    with pytest.raises(ConfigError, match="'output' is given twice"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def test_what_is_dumped_reads_back_equal(values: dict[str, Any]) -> None:
    config = parse_config(values, source="x")
    assert parse_config(config.dump(), source="again") == config


def test_shipped_configurations_are_valid() -> None:
    paths = sorted((ROOT / "recipes" / "data").glob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path)
