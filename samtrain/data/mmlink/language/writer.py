"""The writer that asks a language model. Prompts state all that is known; what comes back is checked."""

import json
from pathlib import Path
from typing import Any

from samtrain.data.mmlink.language import Facts, Scene, Text, nearest_scene
from samtrain.data.mmlink.language.chat import ChatClient, Messages
from samtrain.data.mmlink.options import COVERS, ICONS, ChatWriterOptions

_MAX_DESCRIPTION = 200  # characters
_MAX_TEXT = 1000
_SYSTEM = "You write training data for a model that reads several pictures at once. You state only what you are told."


class ChatWriter:
    """Raises ConfigError where the key is not set."""

    def __init__(self, options: ChatWriterOptions, *, folder: Path) -> None:
        self.client = ChatClient(options, folder=folder)
        self.concurrency = options.concurrency

    def describe(self, scene: Scene) -> str:
        things = ", ".join(scene.things)
        if scene.scenes:
            choices = "\n".join(f"- {text}" for text in scene.scenes)
            wanted = (
                f"Choose the background that suits them best, from this list, and reply with its line alone:\n{choices}"
            )
        else:
            wanted = (
                "Describe a plausible background for them in at most fifteen words, as a prompt for an inpainting "
                "model: a place, its light, no further objects, people or text. Reply with the description alone."
            )
        user = f"A picture shows: {things}. {wanted}\n(variation {scene.seed % 1000})"
        text: str = self.client.complete(_messages(user), check=_description)
        return nearest_scene(text, scene.scenes) if scene.scenes else text

    def write(self, facts: Facts) -> Text:
        text: Text = self.client.complete(_messages(_request(facts)), check=parse_text)
        return text

    def usage(self) -> dict[str, Any]:
        return self.client.usage()

    def close(self) -> None:
        self.client.close()


def parse_text(reply: str) -> Text:
    """Raises ValueError where it is no JSON with instruction and answer."""
    start, end = reply.find("{"), reply.rfind("}")  # models like to wrap JSON in a fence or a sentence
    if start < 0 or end < start:
        raise ValueError("no JSON object in the reply")
    try:
        values = json.loads(reply[start : end + 1])
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    texts = []
    for name in ("instruction", "answer"):
        text = values.get(name) if isinstance(values, dict) else None
        if not isinstance(text, str) or not text.strip() or len(text) > _MAX_TEXT:
            raise ValueError(f"`{name}` is missing, empty or longer than {_MAX_TEXT} characters")
        texts.append(" ".join(text.split()))
    return Text(*texts)


def _description(reply: str) -> str:
    text = " ".join(reply.strip().strip("\"'-*. ").split())
    if not text or len(text) > _MAX_DESCRIPTION:
        raise ValueError(f"a description has 1 to {_MAX_DESCRIPTION} characters, this has {len(text)}")
    return text


def _messages(user: str) -> Messages:
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}]


def _request(facts: Facts) -> str:
    lines = [f"There are {facts.num_images} pictures."]
    if facts.domain == COVERS:
        lines.append("They are covers of the books " + ", ".join(f'"{title}"' for title in facts.titles) + ".")
        lines += [f"The books share their {what}: {value}." for what, value in facts.common.items()]
    else:
        kind = "an icon of " if facts.domain == ICONS else ""
        lines.append(f"All of them show {kind}{facts.name}; nothing else is in more than one.")
        for number, (place, neighbours) in enumerate(zip(facts.places, facts.neighbours), 1):
            caption = facts.captions[number - 1] if number <= len(facts.captions) else ""
            said = f', which a captioner called "{caption}"' if caption and caption != facts.name else ""
            lines.append(f"Picture {number}: it is {place}{said}; also there: {', '.join(neighbours) or 'nothing'}.")
    lines.append(
        "Write an instruction that asks what the pictures have in common, and its answer, which must name it. Vary the "
        'wording. Reply with JSON alone: {"instruction": "...", "answer": "..."}'
    )
    lines.append(f"(variation {facts.seed % 1000})")
    return "\n".join(lines)
