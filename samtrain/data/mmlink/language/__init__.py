"""The writer: descriptions of backgrounds, and instruction and answer from what is known of a sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from samtrain.data.mmlink.options import Choice


@dataclass(frozen=True)
class Scene:
    """A canvas that needs a background. scenes: what the photographs at hand show; empty where any can be made."""

    things: tuple[str, ...]
    scenes: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Facts:
    """What is known of a sample, and what its answer may state.

    domain: objects | icons | covers. name: of A, with its article. captions: of A, one a picture. neighbours: what else
    each picture shows. places: where A is in each. common: of covers, what they share ("author", "genre").
    """

    domain: str
    num_images: int
    name: str
    plural: bool
    captions: tuple[str, ...]
    neighbours: tuple[tuple[str, ...], ...]
    places: tuple[str, ...]
    titles: tuple[str, ...]
    common: dict[str, str]
    seed: int

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Facts":
        """From JSON, where tuples are lists."""
        neighbours = tuple(tuple(names) for names in values["neighbours"])
        lists = {key: tuple(values[key]) for key in ("captions", "places", "titles")}
        return Facts(**values | lists | {"neighbours": neighbours})


@dataclass(frozen=True)
class Text:
    instruction: str
    answer: str


class Writer(Protocol):
    """concurrency: how many calls it takes at once."""

    concurrency: int

    def describe(self, scene: Scene) -> str:
        """A background in a few words.

        Raises:
            Failed: not this time.
        """
        ...

    def write(self, facts: Facts) -> Text:
        """Instruction and answer.

        Raises:
            Failed: not this time.
        """
        ...

    def usage(self) -> dict[str, Any]:
        """What the calls so far have cost; empty where they cost nothing."""
        ...

    def close(self) -> None: ...


def build_writer(choice: Choice, *, work: Path) -> Writer:
    """work: where responses and what they cost are kept.

    Raises:
        ConfigError: no API key where one is needed.
    """
    options: Any = choice.options
    if choice.kind == "openai":
        from samtrain.data.mmlink.language.writer import ChatWriter

        return ChatWriter(options, folder=work / "responses")
    from samtrain.data.mmlink.language.templates import TemplateWriter

    return TemplateWriter()


def nearest_scene(description: str, scenes: Sequence[str]) -> str:
    """The scene that shares most words with a description; among equals the first.

    Raises:
        ValueError: there is none.
    """
    if not scenes:
        raise ValueError("no scenes")
    wanted = set(description.lower().replace(",", " ").replace(".", " ").split())
    wanted -= {"a", "an", "the", "of", "with", "in", "on", "and"}

    def score(scene: str) -> float:
        words = set(scene.lower().split())
        return len(words & wanted) / (1 + 0.1 * len(words)) + (2 if scene.lower() == description.lower() else 0)

    return max(scenes, key=score)
