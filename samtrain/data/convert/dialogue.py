"""Dialogues: every answer of one becomes a sample.

The first question is the instruction as it stands. A later one is preceded by what was said before, a line
`Question: ...` and `Answer: ...` for each; a system text goes in front. Images are those whose placeholders have come
by then, or all where the dialogue has no placeholder.
"""

from dataclasses import dataclass

from samtrain.core.errors import DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER

QUESTION, ANSWER, SYSTEM = "user", "assistant", "system"
_OTHER_MEDIA = ("<video>", "<audio>")


@dataclass(frozen=True)
class Turn:
    """What one side said. is_trained: whether an answer is to be learnt."""

    role: str
    text: str
    is_trained: bool = True


@dataclass(frozen=True)
class Exchange:
    """One answer with all that leads to it."""

    instruction: str
    output: str
    num_images: int


def exchanges(turns: list[Turn], num_images: int, *, layout: str) -> list[Exchange]:
    """The exchanges of a dialogue, one for each answer that is to be learnt.

    Raises:
        DataError: it does not go question, answer, question, answer, or its placeholders disagree with the images.
    """
    system = [turn.text for turn in turns[:1] if turn.role == SYSTEM]
    spoken = turns[len(system) :]
    roles = [turn.role for turn in spoken]
    if not spoken or len(spoken) % 2 or roles != [QUESTION, ANSWER] * (len(spoken) // 2):
        raise DataError(f"its turns are {', '.join(roles) or 'none'}; expected user, assistant, user, assistant, ...")
    questions, answers = [turn.text for turn in spoken[::2]], spoken[1::2]
    _check_media([*system, *questions, *(turn.text for turn in answers)], answers)
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in (*system, *questions))
    if placeholders not in (0, num_images):
        raise DataError(f"has {placeholders} {IMAGE_PLACEHOLDER} placeholders but {num_images} images")
    if not placeholders and layout == "interleaved":
        questions[0] = IMAGE_PLACEHOLDER * num_images + questions[0]
        placeholders = num_images
    found = []
    before = [f"{text}\n" for text in system]
    for question, answer in zip(questions, answers):
        instruction = "".join(before) + question
        if answer.is_trained:
            shown = instruction.count(IMAGE_PLACEHOLDER) if placeholders else num_images
            found.append(Exchange(instruction, answer.text, shown))
        before.append(f"Question: {question}\nAnswer: {answer.text}\n")
    return found


def _check_media(texts: list[str], answers: list[Turn]) -> None:
    for mark in _OTHER_MEDIA:
        if any(mark in text for text in texts):
            raise DataError(f"holds {mark}, which is no image")
    if any(IMAGE_PLACEHOLDER in turn.text for turn in answers):
        raise DataError(f"an answer holds {IMAGE_PLACEHOLDER}; only questions can show images")
