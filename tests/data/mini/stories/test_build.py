"""Story splits of a build: what samples say and show, and builds with, without and beside the game."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samtrain.core.errors import ConfigError, DataError
from samtrain.core.options import parse_options
from samtrain.core.sample import SampleRecord
from samtrain.data import parallel
from samtrain.data.index import ShardIndex
from samtrain.data.mini import build_mini, sources
from samtrain.data.mini.build import REPORT_FILE
from samtrain.data.mini.stories import STORY_SPLITS, installed
from samtrain.data.options import MiniOptions
from samtrain.data.sheet import contact_sheet

SPLITS = ("train", "validation", "test_style", "test_combination", "test_identity")
SMALL = {"num_train": 3, "num_eval": 1, "max_identities": 24, "seed": 3}


def told(game: Any, **more: Any) -> MiniOptions:
    return MiniOptions(**SMALL | {"story_sources": str(game.folder)} | more)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: ShardIndex.load(path).digest for path in sorted(folder.iterdir()) if path.is_dir()}


def records(folder: Path) -> list[SampleRecord]:
    index = ShardIndex.load(folder)
    return [index.read_record(i) for i in range(len(index))]


@pytest.fixture(scope="module")
def built(make_game: Callable[[Path], Any], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A game with one damaged file, and a set that was built with it."""
    folder = tmp_path_factory.mktemp("built")
    game = make_game(folder / "wesnoth" / "1.16")
    game.write(f"campaigns/{game.campaigns['train_story']}/scenarios/02_Bad.cfg", "[scenario]\n")
    build_mini(folder / "set", told(game), cache=cache)
    return game, folder / "set"


@pytest.fixture(scope="module")
def plain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same set, built without the game."""
    folder = tmp_path_factory.mktemp("plain") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installed, "_PLACES", ())
        build_mini(folder, MiniOptions(**SMALL), cache=cache)
    return folder


def test_stories_are_splits_of_their_own_and_leave_the_others_as_they_are(built: tuple[Any, Path], plain: Path) -> None:
    _, folder = built
    assert set(digests(folder)) == {*SPLITS, *STORY_SPLITS}
    rows = json.loads((folder / REPORT_FILE).read_text())["splits"]
    assert [rows[split]["samples"] for split in STORY_SPLITS] == [2, 1, 1]  # limits are upper ones
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        *(REPORT_FILE, "attribution.json", "ATTRIBUTION.md", "COPYING.wesnoth.txt")
    }
    assert set(digests(plain)) == set(SPLITS)
    assert digests(plain).items() <= digests(folder).items()


def test_a_story_sample_shows_who_speaks_and_asks_for_the_third_line(built: tuple[Any, Path], tmp_path: Path) -> None:
    game, folder = built
    campaigns = set()
    for split in STORY_SPLITS:
        index = ShardIndex.load(folder / split)
        for i in range(len(index)):
            record, images = index.read_sample(i)
            meta = record.meta
            campaigns.add((split, meta["campaign"]))
            assert (record.task, meta["part"], meta["licence"]) == ("storytelling", "story", "GPL-2.0-or-later")
            question, first, second, last = record.instruction.split("Caption#")
            assert question.endswith("{image#1}") and first.startswith("1:") and first.endswith("{image#2}")
            assert second.startswith("2:") and second.endswith("{image#3}") and last == "3:"
            assert record.output not in record.instruction
            assert len(meta["speakers"]) == len(meta["pictures"]) == len(images) == 3
            for name, picture, data in zip(meta["speakers"], meta["pictures"], images):
                speaker, *listeners = picture["objects"]
                assert (speaker["name"], speaker["part"]) == (name, "speaker")
                assert all(item["part"] == "listener" and item["name"] in meta["speakers"] for item in listeners)
                assert len({item["identity"] for item in picture["objects"]}) == len(picture["objects"])
                (view,) = {Path(name).stem for name in game.landscapes} & {picture["background"]}
                assert (view == game.landscapes[0]) == (split == "test_story")
                assert Image.open(io.BytesIO(data)).size == (224, 224)
    assert campaigns == set(game.campaigns.items())
    check_masks(folder / "train_story")
    sheet = contact_sheet(folder, "train_story", tmp_path / "sheet.png", boxes=True)
    assert Image.open(sheet).format == "PNG"


def check_masks(folder: Path) -> None:
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        for number, picture in enumerate(json.loads(sample["json"])["meta"]["pictures"]):
            mask = np.array(Image.open(io.BytesIO(sample[f"{number}.mask.png"])))
            assert set(np.unique(mask)) == {0, *(item["value"] for item in picture["objects"])}
            for item in picture["objects"]:
                rows, columns = np.nonzero(mask == item["value"])
                assert item["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert item["visible"] >= 0.85


def test_bytes_depend_on_the_seed_and_not_on_processes(
    built: tuple[Any, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    game, folder = built
    build_mini(tmp_path / "other", told(game, seed=4), cache=cache)
    for split in STORY_SPLITS:
        assert digests(tmp_path / "other")[split] != digests(folder)[split]
    answers = [sorted(one.output for one in records(path / "train_story")) for path in (folder, tmp_path / "other")]
    assert answers[0] == answers[1]
    monkeypatch.setattr(parallel, "ordered_map", partial(parallel.ordered_map, worth_a_pool=1))
    monkeypatch.setattr(parallel, "available_cores", lambda: 2)
    build_mini(tmp_path / "pool", told(game), cache=cache)
    assert digests(tmp_path / "pool") == digests(folder)


def test_the_report_says_what_was_read_and_what_was_not(built: tuple[Any, Path]) -> None:
    game, folder = built
    number = game.campaigns["train_story"]
    part = json.loads((folder / REPORT_FILE).read_text())["parts"]["stories"]
    assert part["built"] is True
    assert part["source"].keys() == {"folder", "version", "digest"} and part["source"]["version"] == "1.16"
    assert part["windows"] == dict.fromkeys(STORY_SPLITS, 2)
    assert part["campaigns"] == {split: [name] for split, name in game.campaigns.items()}
    assert part["messages"] == {"narration": 3, "used": 15}
    assert part["skipped"] == {
        "count": 1,
        "files": {f"campaigns/{number}/scenarios/02_Bad.cfg": "[scenario] is not closed"},
    }
    assert "wesnoth-1.16-httt" in part["campaigns_not_installed"]
    rows = json.loads((folder / "attribution.json").read_text())
    ours = [row for row in rows if row["licence"] == "GPL-2.0-or-later"]
    assert [row["package"] for row in ours] == ["wesnoth-1.16-data", "wesnoth", "wesnoth", "wesnoth"]
    assert {row["author"] for row in ours[1:]} == {"Ann Author (ann)"}
    assert all(row["integrity"] == f"sha256-{part['source']['digest']}" for row in ours)
    page = (folder / "ATTRIBUTION.md").read_text()
    assert f"Tale / of {number} (campaign)" in page  # a bar would end the cell
    assert "train_story, validation_story, test_story are from Battle for Wesnoth" in page
    assert (folder / "COPYING.wesnoth.txt").read_text() == "the licence\n"


def test_without_the_game_the_report_tells_how_to_install_it(plain: Path) -> None:
    part = json.loads((plain / REPORT_FILE).read_text())["parts"]["stories"]
    assert part["built"] is False
    for words in ("not installed", "apt-get install", "wesnoth-1.16-data", "wesnoth-1.16-httt"):
        assert words in part["reason"]
    assert "Wesnoth" not in (plain / "ATTRIBUTION.md").read_text()


def test_a_game_without_campaigns_is_as_good_as_none(
    game: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in game.campaigns.values():
        (game.data / f"campaigns/{number}/_main.cfg").unlink()
    monkeypatch.setattr(installed, "_PLACES", (game.folder.parent,))
    part = build_mini(tmp_path / "set", MiniOptions(**SMALL), cache=cache)["parts"]["stories"]
    assert part["built"] is False and "no campaign with dialogue" in part["reason"] and "apt-get" in part["reason"]
    for options in (told(game), MiniOptions(**SMALL, stories="required")):
        with pytest.raises(DataError, match=r"stories cannot be built from .*no campaign with dialogue"):
            build_mini(tmp_path / "refused", options, cache=cache)
    assert not list(tmp_path.glob("*refused*"))


def test_what_cannot_be_had_is_said_before_anything_is_fetched(
    game: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_npm_command", lambda: pytest.fail("went to the registry"))
    wrong = (
        (MiniOptions(**SMALL, stories="required"), r'stories is "required": .*not installed.*apt-get install'),
        (MiniOptions(**SMALL, story_sources=str(tmp_path / "absent")), r"story_sources: .*absent holds no data"),
        (told(game, stories="never"), r'stories is "never"'),
    )
    for options, message in wrong:
        with pytest.raises(DataError, match=message):
            build_mini(tmp_path / "set", options, cache=tmp_path / "cache")
    assert not (tmp_path / "set").exists()
    with pytest.raises(ConfigError, match="`stories` = False"):  # what YAML makes of `stories: off`
        parse_options(MiniOptions, {"stories": False}, source="recipe")


def test_a_finished_set_is_used_whether_or_not_the_game_is_still_there(
    built: tuple[Any, Path], plain: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    game, folder = built
    for stories in ("if_installed", "required", "never"):
        report = build_mini(folder, MiniOptions(**SMALL, stories=stories), cache=cache)
        assert report["reused"] is True and report["parts"]["stories"]["built"] is True
    assert build_mini(plain, MiniOptions(**SMALL), cache=cache)["reused"] is True
    with pytest.raises(DataError, match=r"was built without stories .*delete this one"):
        build_mini(plain, told(game), cache=cache)
    monkeypatch.setattr(installed, "_PLACES", (game.folder.parent,))
    reason = build_mini(plain, MiniOptions(**SMALL), cache=cache)["parts"]["stories"]["reason"]
    assert f"delete {plain} to have it built anew" in reason


def test_a_split_without_stories_is_left_out(game: Any, cache: Path, tmp_path: Path) -> None:
    (game.data / f"campaigns/{game.campaigns['validation_story']}/_main.cfg").unlink()
    report = build_mini(tmp_path / "set", told(game), cache=cache)
    assert set(report["splits"]) == {*SPLITS, "train_story", "test_story"}
    assert report["parts"]["stories"]["windows"]["validation_story"] == 0
