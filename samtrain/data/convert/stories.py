"""Stories: N pictures in order, a text for each; the last text is to be written.

The instruction is assembled as DEMON does for VIST and AESOP: one of several task instructions, then the captions
template `{image#1}Caption#1:<text>...{image#N}Caption#N:`, nothing between. Which instruction a story gets depends on
the seed and the story alone. The built-in wording is ours; `--instructions core.json` takes a DEMON file's.

`Gathering` puts together the stories of VIST and SSID, whose files list single sentences: it holds only stories that
are not whole yet, and gives each away with its last sentence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samtrain.core.errors import ConfigError, DataError
from samtrain.core.seeds import derive_seed
from samtrain.data.convert.base import Draft, Record, Source, lay_out, shown
from samtrain.data.convert.images import ImageFolder
from samtrain.data.convert.json_stream import Element, Head
from samtrain.data.convert.options import ConvertOptions

INSTRUCTIONS = (
    "Each picture but the last comes with its part of a story. Tell how the story ends in the last picture.",
    "Read the story so far, picture by picture, and write the part that belongs to the last picture.",
    "The first pictures have captions that tell a story. Continue it with a caption for the last picture.",
    "Finish this story so that its ending fits the final picture.",
    "Here is a story in pictures whose last caption is missing. Write it.",
    "Taking the captions of the earlier pictures into account, what happens in the last one?",
    "Complete the story: the last picture still needs its text.",
    "Look at all pictures and their captions, then write the closing part for the final picture.",
    "What would the last caption of this picture story be?",
    "Bring the story told by these pictures to an end that matches the last of them.",
)


def read_instructions(path: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """The instructions of a JSON list, or of a DEMON file; `default` where no file is given.

    Raises:
        ConfigError: the file holds none.
    """
    if path is None:
        return default
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--instructions {path}: cannot be read: {error}") from None
    if isinstance(value, dict):
        metadata = value.get("metadata")
        value = metadata.get("task_instruction") if isinstance(metadata, dict) else None
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise ConfigError(f"--instructions {path}: expected a JSON list of texts, or a DEMON file that holds some")
    return tuple(value)


def prepare(source: Source, options: ConvertOptions) -> Source:
    """The source with the instructions its stories choose from."""
    return replace(source, header=read_instructions(options.instructions, INSTRUCTIONS))


def choose(instructions: tuple[str, ...], options: ConvertOptions, *identity: Any) -> str:
    """The instruction of one sample."""
    return instructions[derive_seed("instruction", options.seed, *identity) % len(instructions)]


def story_draft(
    texts: list[str], names: list[str], instruction: str, row: dict[str, Any], options: ConvertOptions
) -> Draft:
    """The sample of a story.

    Args:
        texts: N of them, in order. names: of the N images.
    """
    if any("{image#" in text for text in texts):
        raise DataError("a text of the story holds the marker {image#, which stands for an image")
    captions = "".join(f"{{image#{i}}}Caption#{i}:{text}" for i, text in enumerate([*texts[:-1], ""], start=1))
    return Draft(lay_out(instruction + captions, len(names), options.layout), texts[-1], list(names), row)


@dataclass(frozen=True)
class Gathering:
    """Whole stories from single sentences.

    Args:
        text, image: the fields with a sentence and with its picture's id.
        order: the field with its place, which begins at any of `firsts`. size: sentences of a story.
    """

    text: str
    image: str
    order: str
    firsts: tuple[int, ...]
    size: int = 5

    def fits(self, head: Head) -> bool:
        """Whether a file lists sentences with such fields."""
        return any(
            isinstance(one, list) and one and isinstance(one[0], dict) and self.image in one[0]
            for one in head.fields.get("annotations", [])
        )

    def draft(
        self, record: Record, source: Source, options: ConvertOptions, images: ImageFolder, folders: tuple[str, ...]
    ) -> Draft:
        """The sample of one of `stories`, whose pictures are in the first of `folders` that holds them."""
        story, album = record.value[0]["story_id"], record.value[0].get("album_id")
        return story_draft(
            [str(sentence[self.text]) for sentence in record.value],
            [images.find(folders, str(sentence[self.image])) for sentence in record.value],
            choose(source.header, options, story),
            {"story_id": story, "album_id": album},
            options,
        )

    def stories(self, elements: Iterator[Element]) -> Iterator[Record]:
        """Records whose value is a story's sentences, in order; at the end those that stayed incomplete."""
        waiting: dict[str, list[dict[str, Any]]] = {}
        finished: set[str] = set()
        number, last = 0, None
        for last in elements:
            sentence, problem = self._sentence(last.value)
            if problem is not None:
                yield Record(number, f"annotation {last.number}", None, last.done, last.total, problem)
            elif (story := str(sentence["story_id"])) in finished:
                problem = f"story {story} has {self.size} sentences already, this is one more"
                yield Record(number, f"annotation {last.number}", None, last.done, last.total, problem)
            else:
                waiting.setdefault(story, []).append(sentence)
                if len(waiting[story]) < self.size:
                    continue
                sentences = sorted(waiting.pop(story), key=lambda one: one[self.order])
                finished.add(story)
                yield Record(number, f"story {story}", sentences, last.done, last.total, self._order_problem(sentences))
            number += 1
        for story, sentences in waiting.items():
            assert last is not None
            problem = f"has {len(sentences)} sentences, expected {self.size}"
            yield Record(number, f"story {story}", sentences, last.total, last.total, problem)
            number += 1

    def _sentence(self, value: Any) -> tuple[dict[str, Any], str | None]:
        """The sentence in an annotation, a list of one; or what is wrong."""
        if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
            return {}, f"is {shown(value)}, expected a list of one object"
        sentence = value[0]
        for name in ("story_id", self.text, self.image):
            if isinstance(sentence.get(name), bool) or not isinstance(sentence.get(name), (str, int)):
                return {}, f"`{name}` is {shown(sentence.get(name))}"
        try:
            place = int(sentence[self.order])
        except (KeyError, TypeError, ValueError):
            return {}, f"`{self.order}` is {shown(sentence.get(self.order))}, expected a number"
        return {"story_id": sentence["story_id"], **sentence, self.order: place}, None

    def _order_problem(self, sentences: list[dict[str, Any]]) -> str | None:
        places = [sentence[self.order] for sentence in sentences]
        if any(places == list(range(first, first + self.size)) for first in self.firsts):
            return None
        return f"`{self.order}` is {places}, expected {' or '.join(f'{n}...{n + self.size - 1}' for n in self.firsts)}"
