"""Finding the game."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samtrain.core.errors import DataError
from samtrain.data.mini.stories import installed
from samtrain.data.mini.stories.installed import find_source


def test_a_named_folder_may_be_the_game_its_data_or_the_place_of_its_versions(game: Any) -> None:
    for folder in (game.folder, game.data, game.folder.parent):
        source = find_source(str(folder))
        assert source is not None and (source.data, source.version) == (game.data, "1.16")


def test_a_named_folder_without_the_game_is_an_error_that_tells_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "data" / "core").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"story_sources: .* holds no data of Battle for Wesnoth.*apt-get install"):
            find_source(folder)


def test_the_usual_places_are_looked_through_and_the_newest_version_is_taken(
    make_game: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = (tmp_path / "absent", tmp_path / "games")
    monkeypatch.setattr(installed, "_PLACES", places)
    assert find_source(None) is None
    for version in ("1.9", "1.16", "notes"):
        make_game(tmp_path / "games" / version)
    (tmp_path / "games" / "1.18").mkdir()  # without data
    source = find_source(None)
    assert source is not None and source.version == "1.16"
    shutil.move(tmp_path / "games" / "1.9" / "data", tmp_path / "games" / "data")  # as other systems install it
    source = find_source(None)
    assert source is not None and source.version == "" and source.package("campaigns/Liberty") == "wesnoth"


def test_campaigns_have_the_names_of_their_debian_packages(game: Any) -> None:
    source = find_source(game.folder)
    assert source is not None
    assert source.package("campaigns/Heir_To_The_Throne") == "wesnoth-1.16-httt"
    assert source.package("campaigns/mine") == "wesnoth"
    assert len(source.missing_packages()) == 16
    (game.data / "campaigns" / "Liberty").mkdir()
    assert "wesnoth-1.16-l" not in source.missing_packages() and len(source.missing_packages()) == 15
    assert "wesnoth-1.16-data" in installed.INSTALL and "wesnoth-1.16-httt" in installed.INSTALL
