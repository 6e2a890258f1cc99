"""What is taken out of the game: whose it is, what it looks like, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samtrain.data.mini.stories import stock
from samtrain.data.mini.stories.campaigns import read_library
from samtrain.data.mini.stories.stock import STORY_SPLITS, StoryFacts, StoryStock, recoloured, write_stock
from samtrain.data.mini.stories.wml import FileTree

OFFICIAL = (
    *("Dead_Water", "Delfadors_Memoirs", "Descent_into_Darkness", "Eastern_Invasion", "Heir_To_The_Throne", "LOW"),
    *("Liberty", "Northern_Rebirth", "Sceptre_of_Fire", "Secrets of the Ancients", "Son_of_the_Black-Eye"),
    *("The_Hammer_of_Thursagan", "The_Rise_of_Wesnoth", "The_South_Guard", "Two_Brothers", "Under_the_Burning_Suns"),
)


def write(game: Any, path: Path) -> tuple[StoryFacts, StoryStock]:
    tree = FileTree(game.data)
    facts = write_stock(path, tree, read_library(tree), progress=lambda what, done, total: None)
    return facts, StoryStock(path)


def colours_of(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.array(image).reshape(-1, 4).tolist()}


def test_the_games_own_campaigns_have_fixed_splits() -> None:
    """Moving one would put stories that a model was trained on into the test of another build."""
    splits = {split: {name for name in OFFICIAL if stock.campaign_split(name) == split} for split in STORY_SPLITS}
    assert splits[stock.TEST] == {"Heir_To_The_Throne", "The_South_Guard", "Two_Brothers"}
    assert splits[stock.VALIDATION] == {"Secrets of the Ancients"}
    assert stock.is_held_out_landscape("a/landscape-bridge.jpg") == stock.is_held_out_landscape(
        "landscape-bridge_sun.jpg"
    )


def test_a_stock_is_the_same_wherever_the_game_lies(game: Any, make_game: Any, tmp_path: Path) -> None:
    facts, read = write(game, tmp_path / "one.zip")
    again, _ = write(make_game(tmp_path / "elsewhere"), tmp_path / "two.zip")
    assert facts == again
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert facts.windows == dict.fromkeys(STORY_SPLITS, 2) and facts.skipped == {}
    assert facts.campaigns == {split: [game.campaigns[split]] for split in STORY_SPLITS}
    assert [len(names) for names in read.landscapes.values()] == [1, 1]
    assert facts.num_sprites == 4 + 2 + 3  # the guard's, the healer's, each campaign's wanderer
    shown = read.windows[stock.TEST][0].lines[0].speaker.sprites[0]
    assert max(read.sprite(shown, 1).size) < 72  # cropped


def test_team_colours_are_moved_to_the_armys(game: Any, tmp_path: Path) -> None:
    _, read = write(game, tmp_path / "stock.zip")
    name = read.windows[stock.TRAIN][0].lines[0].speaker.sprites[0]
    colours = [colours_of(read.sprite(name, side)) for side in (1, 2, 3)]
    assert (255, 0, 0, 255) in colours[0] and (0x2E, 0x41, 0x9B, 255) in colours[1]
    assert colours[2] == colours[0]  # two armies' colours are known; the third begins anew
    assert not any((244, 154, 193, 255) in found for found in colours)


def test_lighter_and_darker_team_colours_stay_so() -> None:
    palette = [(200, 0, 100), (100, 0, 50), (230, 200, 225)]
    image = Image.fromarray(
        np.array([[(*palette[0], 255), (*palette[1], 255), (*palette[2], 7), (1, 2, 3, 4)]], np.uint8)
    )
    found = np.array(recoloured(image, palette, [(0, 0, 200), (255, 255, 255), (0, 0, 0)]))[0].tolist()
    assert found[0] == [0, 0, 200, 255]
    assert found[1] == [0, 0, 100, 255]
    assert found[2][0] == found[2][1] > 150 and found[2][2] > 200 and found[2][3] == 7
    assert found[3] == [1, 2, 3, 4]


def test_bad_pictures_are_listed_and_done_without(game: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = game.data / "core/images/units/people"
    (people / "guard-defend.png").write_bytes(b"no picture")
    Image.new("RGBA", (72, 72)).save(people / "guard-attack-1.png")  # draws nothing
    Image.new("RGBA", (900, 900), "red").save(people / "healer-heal.png")
    (tmp_path / "private.png").write_bytes((people / "guard.png").read_bytes())
    (people / "guard-attack-2.png").unlink()
    (people / "guard-attack-2.png").symlink_to(tmp_path / "private.png")
    story = game.data / "core/images/story"
    (story / "landscape-broken.jpg").write_bytes(b"\xff\xd8\xff")
    Image.new("RGB", (900, 20)).save(story / "landscape-strip.jpg")
    facts, read = write(game, tmp_path / "stock.zip")
    assert {Path(name).name for name in facts.skipped} == {
        *("guard-defend.png", "guard-attack-1.png", "healer-heal.png", "landscape-broken.jpg", "landscape-strip.jpg")
    }
    ada, _, nell = (line.speaker for line in read.windows[stock.TRAIN][0].lines)
    assert [Path(name).name for name in ada.sprites] == ["guard.png"]
    assert [Path(name).name for name in nell.sprites] == ["healer.png"]
    monkeypatch.setattr(stock, "_MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(stock.UnusableStories, match="no landscape"):
        write(game, tmp_path / "other.zip")


def test_characters_whose_sprites_are_all_bad_tell_nothing(game: Any, tmp_path: Path) -> None:
    for path in (game.data / "core/images/units/people").glob("healer*"):
        path.write_bytes(b"no picture")
    with pytest.raises(stock.UnusableStories, match="no campaign with dialogue"):
        write(game, tmp_path / "stock.zip")
    assert not (tmp_path / "stock.zip").exists()


def test_what_is_told_in_training_is_not_told_in_a_test(game: Any, tmp_path: Path) -> None:
    train, test = game.campaigns[stock.TRAIN], game.campaigns[stock.TEST]
    path = game.data / f"campaigns/{test}/scenarios/01_First.cfg"
    path.write_text(path.read_text().replace(f"the captain of {test}", f"the captain of {train}"))
    facts, read = write(game, tmp_path / "stock.zip")
    assert facts.windows[stock.TEST] == 1 and facts.windows[stock.TRAIN] == 2
    told = {text for window in read.windows[stock.TRAIN] for text in window.texts}
    assert not told & {window.texts[-1] for split in STORY_SPLITS[1:] for window in read.windows[split]}


def test_without_team_colours_sprites_stay_as_painted_and_it_is_said(game: Any, tmp_path: Path) -> None:
    for text in ("[color_range]\nrgb=no\ndefault=yes\n[/color_range]\n", "[color_range]\n"):
        game.write("core/team-colors.cfg", text)
        facts, read = write(game, tmp_path / "stock.zip")
        assert list(facts.skipped) == ["core/team-colors.cfg"]
        name = read.windows[stock.TRAIN][0].lines[0].speaker.sprites[0]
        assert (244, 154, 193, 255) in colours_of(read.sprite(name, 1))
