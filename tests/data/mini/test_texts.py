"""English: articles, plurals, names that mean nothing."""

import re

import pytest

from samtrain.data.mini.texts import NAMES, NUM_COMMON, category_texts, common_texts, linking_texts
from samtrain.data.mini.vocabulary import KINDS, SPOKEN, phrase


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("hourglass done", "an hourglass"),
        ("umbrella", "an umbrella"),
        ("T-Rex", "a T-Rex"),
        ("automobile", "a car"),
        ("grapes", "grapes"),
        ("scissors", "scissors"),
        ("broccoli", "broccoli"),
        ("american football", "an American football"),
    ],
)
def test_things_have_their_article(label: str, expected: str) -> None:
    assert phrase(label) == expected


def test_verbs_agree_with_plurals() -> None:
    sentences = [common_texts("glasses", form)[1] for form in range(NUM_COMMON)]
    assert "Glasses appear in every picture." in sentences
    assert "Yes, there are glasses in all of them." in sentences
    sentences = [common_texts("elephant", form)[1] for form in range(NUM_COMMON)]
    assert "An elephant appears in every picture." in sentences
    assert "Yes, there is an elephant in all of them." in sentences
    assert all("an elephant" in sentence.lower() for sentence in sentences)
    assert len(set(sentences)) == NUM_COMMON >= 8


def test_every_label_has_one_kind_and_reworded_ones_exist() -> None:
    labels = [label for kind in KINDS for label in kind.labels]
    assert len(labels) == len(set(labels))
    assert set(SPOKEN) <= set(labels)
    names = [phrase(label) for label in labels]
    assert len(names) == len(set(names))


def test_category_answers_name_the_kind() -> None:
    bird = next(kind for kind in KINDS if kind.name == "bird")
    assert {re.search(r"birds?", category_texts(bird, form)[1].lower()) is not None for form in range(20)} == {True}


def test_invented_names_are_no_words_of_the_set() -> None:
    words = {word.lower() for kind in KINDS for label in kind.labels for word in re.findall(r"\w+", phrase(label))}
    assert len(set(NAMES)) == len(NAMES) > 50
    for name in NAMES:
        assert name.lower() not in words and not name.lower().endswith("s")


def test_linking_prompts_have_the_authors_form() -> None:
    prompt, answer = linking_texts(name="Zavika", place="top left", neighbour="bus", asked=2, num_images=2, form=0)
    assert prompt == "{image#1}Caption#1: This is Zavika.{image#2}Where is Zavika, and what is beside Zavika?"
    assert answer == "Zavika is at the top left, beside a bus."
    prompt, _ = linking_texts(name="Zavika", place="centre", neighbour="owl", asked=3, num_images=3, form=0)
    assert prompt.endswith("{image#2}{image#3}In picture 3: where is Zavika, and what is beside Zavika?")
