"""The writer without a model: English that is right and says nothing that is not so."""

import dataclasses

import pytest

from samtrain.data.mmlink.language import Facts, Scene, nearest_scene, templates
from samtrain.data.mmlink.language.templates import SCENES, TemplateWriter, noun_phrase

FOX = Facts(
    domain="objects",
    num_images=2,
    name="a red fox",
    plural=False,
    captions=("a red fox", "a red fox"),
    neighbours=(("a bus",), ("an owl", "a hat")),
    places=("at the top left", "in the middle"),
    titles=(),
    common={},
    seed=0,
)


def _all(facts: Facts) -> list[tuple[str, str]]:
    texts = (TemplateWriter().write(dataclasses.replace(facts, seed=seed)) for seed in range(200))
    return sorted({(text.instruction, text.answer) for text in texts})


def test_every_form_is_used_and_names_the_thing() -> None:
    found = _all(FOX)
    assert len(found) == len(templates._OBJECTS)
    assert all("red fox" in answer.lower() and "{" not in question + answer for question, answer in found)
    assert (
        "Please describe the element that is visible in both pictures.",
        "The item in both pictures is a red fox.",
    ) in found
    assert (
        "Which object do both pictures show, and what stands beside it?",
        "Both pictures show a red fox: beside a bus in the first picture and beside an owl and a hat in the second.",
    ) in found
    assert (
        "Where is the object that both pictures have in common?",
        "It is a red fox: at the top left in the first picture and in the middle in the second.",
    ) in found


def test_three_pictures_and_plurals() -> None:
    grapes = dataclasses.replace(
        FOX,
        num_images=3,
        name="grapes",
        plural=True,
        captions=("grapes",) * 3,
        neighbours=(("a bus",),) * 3,
        places=("on the left", "on the right", "at the top"),
    )
    found = _all(grapes)
    assert ("Which object appears in all three pictures?", "Grapes appear in all three pictures.") in found
    assert ("Can you pinpoint the same object present in all three pictures?", "Yes, they are grapes.") in found
    assert any(
        answer.endswith("on the left in the first picture, on the right in the second, and at the top in the third.")
        for _, answer in found
    )
    assert any("beside a bus in all" in answer for _, answer in found)


def test_icons_say_where() -> None:
    icons = dataclasses.replace(
        FOX, domain="icons", name="an acorn", captions=(), neighbours=(), places=("row 1, column 2", "row 3, column 1")
    )
    assert (
        "Can you pinpoint the same icon present in both visuals?",
        "Yes, it is an icon of an acorn: row 1, column 2 in the first picture and row 3, column 1 in the second.",
    ) in _all(icons)


@pytest.mark.parametrize(
    ("common", "answer"),
    [
        ({"author": "Jane Austen"}, "They are both by Jane Austen."),
        ({"genre": "play"}, "They are of the same genre: play."),
        (
            {"author": "Jane Austen", "genre": "romance"},
            "They are both by Jane Austen, and of the same genre: romance.",
        ),
    ],
)
def test_covers_say_what_is_shared(common: dict[str, str], answer: str) -> None:
    covers = dataclasses.replace(
        FOX, domain="covers", captions=(), neighbours=(), places=(), titles=("Emma", "Persuasion"), common=common
    )
    found = _all(covers)
    assert ("What do these two books have in common?", answer) in found
    assert any('"Emma" and "Persuasion"' in text for _, text in found)


def test_a_caption_with_an_article_is_preferred_to_a_name() -> None:
    assert noun_phrase(dataclasses.replace(FOX, captions=("A gray upholstered sofa.", "sofa on white"))) == (
        "a gray upholstered sofa"
    )
    assert noun_phrase(FOX) == "a red fox"


def test_backgrounds_come_from_the_photographs_or_from_the_list() -> None:
    writer = TemplateWriter()
    found = {writer.describe(Scene(("a fox",), ("grey rocks", "a lake"), seed)) for seed in range(20)}
    assert found == {"grey rocks", "a lake"}
    assert {writer.describe(Scene((), (), seed)) for seed in range(300)} == set(SCENES)
    assert nearest_scene("A calm lake, at dusk.", ("grey rocks", "a lake", "a sea at dusk")) in (
        "a lake",
        "a sea at dusk",
    )
    assert nearest_scene("a lake", ("a big lake of ice", "a lake")) == "a lake"
    with pytest.raises(ValueError):
        nearest_scene("x", ())
