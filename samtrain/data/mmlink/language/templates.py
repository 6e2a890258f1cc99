"""A writer without a model: paraphrases over known facts. It states nothing that is not so, and never fails."""

from typing import Any

import numpy as np

from samtrain.data.mmlink.language import Facts, Scene, Text
from samtrain.data.mmlink.options import COVERS, ICONS

_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
# Where any background can be made and no photograph limits the choice.
SCENES = (
    "a sunny meadow with hills in the distance",
    "a quiet street in an old town",
    "a sandy beach with gentle waves",
    "a dense green forest",
    "a wooden floor in a bright room",
    "a snowy mountain slope",
    "a park with autumn leaves on the ground",
    "a calm lake at sunset",
    "a stone courtyard with ivy on the walls",
    "a desert under a clear sky",
    "a kitchen with white tiles",
    "a grey studio wall with soft light",
    "a field of wheat before a storm",
    "a cobbled market square in the morning",
    "a garden path between flower beds",
    "a library with tall shelves",
)

# (instruction, answer). {pics}: "both pictures", "all three pictures". {a}/{A}: the thing with its article.
# {s}: the verb's ending, {is}: is or are, {it}: it or they. {where}, {beside}: said picture by picture.
_OBJECTS: tuple[tuple[str, str], ...] = (
    ("Please describe the element that is visible in {pics}.", "The item in {pics} is {a}."),
    ("Can you pinpoint the same object present in {pics}?", "Yes, {it} {is} {a}."),
    ("Which object appears in {pics}?", "{A} appear{s} in {pics}."),
    ("What do {pics} have in common?", "What {pics} have in common is {a}."),
    ("Identify the thing that {pics} share.", "They share {a}."),
    ("Name the one thing that keeps coming back.", "{A} keep{s} coming back."),
    ("Look at {pics}. What can be seen in each of them?", "{A} can be seen in each of them."),
    ("One object is shown more than once, never quite the same. Which one?", "{It} {is} {a}."),
    ("Which object do {pics} show, and what stands beside it?", "{Pics} show {a}: {beside}."),
    ("Find the shared object and say what accompanies it.", "The shared object is {a}; {it} {is} {beside}."),
    ("Where is the object that {pics} have in common?", "{It} {is} {a}: {where}."),
    ("Tell me what is in {pics} and where it is in each.", "{A}: {where}."),
)
_ICONS: tuple[tuple[str, str], ...] = (
    ("Can you pinpoint the same icon present in {visuals}?", "Yes, it is an icon of {a}: {where}."),
    ("Which icon is in {visuals}?", "The icon of {a} is in {visuals}."),
    ("Find the one icon that the grids share.", "The grids share the icon of {a}."),
    ("One icon appears in each grid. What does it show?", "It shows {a}."),
    ("Which icon do the grids have in common, and where is it?", "It is the icon of {a}: {where}."),
    ("Compare the grids. Which symbol is repeated?", "The symbol of {a} is repeated."),
)
_AUTHOR: tuple[tuple[str, str], ...] = (
    ("What do these {n} books have in common?", "They are all by {author}."),
    ("Look at the covers. Who wrote these books?", "{titles} were written by {author}."),
    ("Which author do the books on these covers share?", "The books share the author {author}."),
    ("How are the books in the pictures related?", "They are works of the same author, {author}."),
)
_GENRE: tuple[tuple[str, str], ...] = (
    ("What do these {n} books have in common?", "They are of the same genre: {genre}."),
    ("Look at the covers. Which genre do the books share?", "{titles} share the genre {genre}."),
    ("To which genre do the books on these covers belong?", "The books belong to the genre {genre}."),
    ("How are the books in the pictures related?", "They are related by their genre, {genre}."),
)
_BOTH: tuple[tuple[str, str], ...] = (
    ("What do these {n} books have in common?", "They are all by {author}, and of the same genre: {genre}."),
    ("How are the books in the pictures related?", "They are works of {author} of the same genre, {genre}."),
    ("Look at the covers. What connects the books?", "{titles} are by {author} and share the genre {genre}."),
)


class TemplateWriter:
    """Deterministic in the seed of what is asked."""

    concurrency = 1

    def describe(self, scene: Scene) -> str:
        scenes = scene.scenes or SCENES
        return scenes[int(np.random.default_rng(scene.seed).integers(len(scenes)))]

    def write(self, facts: Facts) -> Text:
        rng = np.random.default_rng(facts.seed)
        if facts.domain == COVERS:
            return _cover_text(facts, rng)
        forms = _ICONS if facts.domain == ICONS else _OBJECTS
        instruction, answer = forms[int(rng.integers(len(forms)))]
        words = _words(facts)
        return Text(instruction.format(**words), answer.format(**words))

    def usage(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return


def _words(facts: Facts) -> dict[str, str]:
    thing = noun_phrase(facts)
    together = "both" if facts.num_images == 2 else f"all {_NUMBERS[facts.num_images]}"
    return {
        "a": thing,
        "A": _capital(thing),
        "pics": f"{together} pictures",
        "Pics": f"{_capital(together)} pictures",
        "visuals": f"{together} visuals",
        "s": "" if facts.plural else "s",
        "is": "are" if facts.plural else "is",
        "it": "they" if facts.plural else "it",
        "It": "They" if facts.plural else "It",
        "where": _by_picture(facts.places),
        "beside": _by_picture(tuple(f"beside {_listed(names)}" for names in facts.neighbours)),
    }


def noun_phrase(facts: Facts) -> str:
    """A caption where it is a phrase with an article, the shortest one; else the name."""
    phrases = [caption.strip().rstrip(".") for caption in facts.captions]
    phrases = [
        phrase for phrase in phrases if phrase.lower().startswith(("a ", "an ", "the ")) and phrase != facts.name
    ]
    if not phrases or facts.plural:
        return facts.name
    phrase = min(phrases, key=lambda text: (len(text), text))
    return phrase[0].lower() + phrase[1:]


def _cover_text(facts: Facts, rng: np.random.Generator) -> Text:
    forms = _BOTH if len(facts.common) == 2 else _AUTHOR if "author" in facts.common else _GENRE
    instruction, answer = forms[int(rng.integers(len(forms)))]
    titles = _listed([f'"{title}"' for title in facts.titles])
    values = {"n": _NUMBERS[facts.num_images], "titles": titles, **facts.common}
    if facts.num_images == 2:
        answer = answer.replace("They are all", "They are both")
    return Text(instruction.format(**values), answer.format(**values))


def _by_picture(parts: tuple[str, ...]) -> str:
    """ "at the top in the first picture, and at the left in the second"."""
    if not parts:
        return ""
    if len(set(parts)) == 1:
        return f"{parts[0]} in {'both' if len(parts) == 2 else 'all'}"
    said = [f"{part} in the {_ORDINALS[i]}{' picture' if i == 0 else ''}" for i, part in enumerate(parts)]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])}{',' if len(said) > 2 else ''} and {said[-1]}"


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
