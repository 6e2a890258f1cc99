"""Who says what, in which order."""

from typing import Any

import pytest

from samtrain.data.mini.stories.campaigns import Campaign, Library, read_library
from samtrain.data.mini.stories.installed import find_source
from samtrain.data.mini.stories.stock import TRAIN
from samtrain.data.mini.stories.wml import FileTree

Game = Any  # conftest's


def library(game: Game) -> Library:
    return read_library(FileTree(game.data))


def campaign(game: Game, events: str) -> Campaign:
    """The training campaign, its first scenario's events replaced."""
    number = game.campaigns[TRAIN]
    path = game.data / f"campaigns/{number}/scenarios/01_First.cfg"
    head = path.read_text().split("    [event]")[0]
    path.write_text(head + events + "[/scenario]\n")
    return next(one for one in library(game).campaigns if one.id == number)


def say(speaker: str, text: str = "Some words of no weight.") -> str:
    return f'[message]\nspeaker={speaker}\nmessage= _ "{text}"\n[/message]\n'


def texts(found: Campaign) -> list[tuple[str, ...]]:
    return [window.texts for window in found.windows]


def test_windows_are_three_lines_in_a_row_with_their_speakers(game: Game) -> None:
    found = library(game)
    assert found.skipped == {} and found.num_unit_types == 3 and len(found.campaigns) == 3
    one = next(one for one in found.campaigns if one.id == game.campaigns[TRAIN])
    number = one.id
    assert (one.name, one.authors, one.skipped, one.num_files) == (f"Tale | of {number}", ("Ann Author (ann)",), {}, 3)
    first, second = one.windows  # "Hush!" is no line to end with, the narrator's no line of a character
    assert first.texts == (
        f"Who goes there, so late at night in {number}?",
        f'I\'ve come a long way to see "{number}" once more.',
        f"Then rest; the gates of {number} stay shut until dawn.",
    )
    assert second.texts[-1] == f"I will tell the captain of {number} in the morning."
    assert (first.campaign, first.scenario) == (number, "first")
    ada, martin, nell = (line.speaker for line in first.lines)
    assert (ada.id, ada.name, ada.unit_type, ada.side) == ("Ada", f"Ada of {number}", "Guard", 1)
    assert (martin.id, martin.name, martin.unit_type, martin.side) == ("Mar'tin", "Mar'tin", "Wanderer", 2)
    assert martin.sprites == (f"campaigns/{number}/images/units/wanderer.png",)
    assert nell.sprites == tuple(f"core/images/units/people/{name}.png" for name in ("healer", "healer-heal"))
    assert len(ada.sprites) == 4 and not any("die" in sprite or "stone" in sprite for sprite in ada.sprites)
    assert one.lines == {"used": 5, "narration": 1}


def test_an_unknown_speaker_or_text_ends_a_run_and_is_counted(game: Game) -> None:
    long = " ".join(["word"] * 60)
    said = [("Ada", f"Number {i} of them all, I am.") for i in range(4)]
    said = [*said[:2], ("Ghost of nobody", "Boo."), said[2], ("Ada", "Hello, $unit.name|!"), ("Ada", long), said[3]]
    body = "".join(say(*words) for words in [*said, ("narrator", "So it was."), ("Ada", "")])
    found = campaign(game, f"[event]\n{body}[/event]\n")
    assert found.windows == []
    assert found.lines == {
        "used": 4,
        "speaker or sprite unknown": 1,
        "narration": 1,
        "text with variables, or none": 2,
        "longer than 50 words": 1,
    }


def test_branches_are_stories_of_their_own(game: Game) -> None:
    a, b, c, d, e, f = (say("Ada", f"Line number {i} is said by Ada.") for i in range(6))
    option = f"[option]\n[command]\n{f}[/command]\n[/option]\n[/message]\n"
    choice = say("Ada", "Which way shall we go now?").replace("[/message]\n", option)
    branch = f"[if]\n[variable]\n[/variable]\n[then]\n{c}{d}{e}[/then]\n[else]\n{f}[/else]\n[/if]\n"
    found = campaign(game, f"[event]\n{a}{b}{branch}{a}{b}{choice}{c}{d}[/event]\n")
    assert texts(found) == [
        ("Line number 0 is said by Ada.", "Line number 1 is said by Ada.", "Which way shall we go now?"),
        tuple(f"Line number {i} is said by Ada." for i in (2, 3, 4)),
    ]
    assert len({window.story for window in found.windows}) == 2


def test_unit_and_second_unit_are_whom_the_event_names(game: Game) -> None:
    body = say("unit", "I am the one who came.") + say("second_unit", "I am the one who stayed.") + say("unit")
    filters = "[filter]\nid=Ada\n[/filter]\n[filter_second]\nid=Mar'tin\n[/filter_second]\n"
    (window,) = campaign(game, f"[event]\n{filters}{body}[/event]\n[event]\n{body}[/event]\n").windows
    assert [line.speaker.id for line in window.lines] == ["Ada", "Mar'tin", "Ada"]


def test_the_same_three_lines_are_told_once(game: Game) -> None:
    event = "[event]\n" + "".join(say("Ada", f"Line number {i} is said by Ada.") for i in range(3)) + "[/event]\n"
    assert len(campaign(game, event + event).windows) == 1


def test_markup_is_no_placeholder_for_a_picture(game: Game) -> None:
    lines = [
        say("Ada", text) for text in ("See <image> and &lt;image&gt; here.", "a^b is two", "One <b>bold</b> word here")
    ]
    (window,) = campaign(game, f"[event]\n{''.join(lines)}[/event]\n").windows
    assert window.texts == ("See and here.", "b is two", "One bold word here")


def test_characters_without_a_sprite_have_no_lines(game: Game) -> None:
    unit = '{NAMED_UNIT 2 Ghost 1 1 Boo ( _ "Boo")}\n{NAMED_UNIT 2 Nobody 1 1 Who ( _ "Who")}\n'
    found = campaign(game, f"[event]\n{unit}{say('Boo')}{say('Who')}{say('Ada')}[/event]\n")
    assert found.lines == {"speaker or sprite unknown": 2, "used": 1}


def test_a_campaign_that_cannot_be_read_is_listed_and_the_others_told(game: Game) -> None:
    number = game.campaigns[TRAIN]
    game.write(f"campaigns/{number}/_main.cfg", "[campaign]\nid=x\n")
    game.write("campaigns/empty/readme.cfg", "")
    game.write("campaigns/tutorial/_main.cfg", "[campaign]\nid=Tutorial\ndefine=T\n[/campaign]\n")
    found = library(game)
    assert [one.id for one in found.campaigns] == sorted(set(game.campaigns.values()) - {number})
    assert list(found.skipped) == [f"campaigns/{number}"] and "not closed" in found.skipped[f"campaigns/{number}"]


def test_a_damaged_scenario_is_listed_and_the_rest_of_the_campaign_told(game: Game) -> None:
    number = game.campaigns[TRAIN]
    game.write(f"campaigns/{number}/scenarios/02_Bad.cfg", "[scenario]\n{NAMED_UNIT 1\n[/scenario]\n")
    one = next(one for one in library(game).campaigns if one.id == number)
    assert list(one.skipped) == [f"campaigns/{number}/scenarios/02_Bad.cfg"]
    assert len(one.windows) == 2


def test_the_installed_game_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the one test that wants it
    source = find_source(None)
    if source is None or not source.version:
        pytest.skip("Battle for Wesnoth is not installed")
    found = read_library(FileTree(source.data))
    skipped = dict(found.skipped)
    for one in found.campaigns:
        skipped |= one.skipped
    assert skipped == {}
    assert found.num_unit_types > 200
    for one in found.campaigns:
        assert len(one.windows) > 10 and one.authors, one.id
        assert sum(one.lines[key] for key in one.lines if key != "used") < one.lines["used"], one.id
