"""Unit types and the sprites they are drawn with.

A type's poses are frames of its animations that show the unit itself: in the folder of its standing picture, and named
after it. Projectiles, halos and dying are left out; of an action's frames, which differ little, two are taken.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from samtrain.data.mini.stories.wml import Node

MAX_POSES = 12  # of a look, in the order of the animations; more would only weigh
_MAX_FRAMES = 64
_NUMBER = re.compile(r"[-_]?\d+$")
_RANGE = re.compile(r"\[([^\]]*)\]")
_NO_POSE = frozenset({"death", "filter_attack", "missile_frame"})


@dataclass(frozen=True)
class Look:
    """How a unit type of one gender and variation is drawn. poses: image names, the standing picture first."""

    unit_type: str
    name: str
    poses: tuple[str, ...]


class UnitTypes:
    """Unit types by id. Later ones replace earlier ones of the same id, as a campaign's do."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._nodes: dict[str, Node] = {}
        self.add(nodes)

    def add(self, nodes: Iterable[Node]) -> None:
        """Learn every [unit_type] at or below `nodes`."""
        for root in nodes:
            for node in root.walk():
                if node.tag == "unit_type" and node.values.get("id"):
                    self._nodes[node.values["id"]] = node

    def copy(self) -> "UnitTypes":
        other = UnitTypes()
        other._nodes = dict(self._nodes)
        return other

    def __contains__(self, unit_type: str) -> bool:
        return unit_type in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def look(self, unit_type: str, *, gender: str = "", variation: str = "") -> Look | None:
        """How the type is drawn; None where it is unknown or has no picture of its own."""
        layers = self._layers(unit_type, gender=gender, variation=variation)
        standing = next((image for layer in layers for image in frames(layer.values.get("image", ""))), None)
        if standing is None:
            return None
        actions: dict[str, list[str]] = {}
        for layer in layers:
            for image in dict.fromkeys(_animation_frames(layer)):
                if image != standing and _belongs_to(image, standing):
                    actions.setdefault(_NUMBER.sub("", PurePosixPath(image).stem), []).append(image)
        poses = dict.fromkeys([standing])
        for images in actions.values():
            poses |= dict.fromkeys([images[0], images[len(images) // 2]])
        name = next((layer.values["name"] for layer in layers if layer.values.get("name")), unit_type)
        return Look(unit_type, name.split("^")[-1], tuple(poses)[:MAX_POSES])

    def _layers(self, unit_type: str, *, gender: str, variation: str) -> list[Node]:
        """The nodes that describe the type, the most special one first."""
        layers: list[Node] = []
        seen: set[str] = set()
        while unit_type in self._nodes and unit_type not in seen:
            seen.add(unit_type)
            node = self._nodes[unit_type]
            for child in node.children:
                chosen = child.tag == "variation" and variation and child.values.get("variation_id") == variation
                if chosen or (child.tag == gender and gender in ("male", "female")):
                    layers.append(child)
            layers.append(node)
            base = node.first("base_unit")
            unit_type = base.values.get("id", "") if base else ""
        return layers


def frames(value: str) -> list[str]:
    """The images of an animation's `image=`: "a-[1~3].png:[100*3],b.png~RC(magenta>red):50" -> a-1, a-2, a-3, b."""
    images: list[str] = []
    for part in _split(value):
        path = part.split("~", 1)[0] if "[" not in part else re.split(r"~(?![^\[]*\])", part, maxsplit=1)[0]
        path = re.split(r":(?![^\[]*\])", path, maxsplit=1)[0].strip()
        if not path.endswith(".png"):
            continue
        found = _RANGE.search(path)
        steps = _steps(found[1]) if found else [""]
        images.extend(path[: found.start()] + step + path[found.end() :] if found else path for step in steps)
        if len(images) >= _MAX_FRAMES:
            break
    return [image for image in images if "[" not in image][:_MAX_FRAMES]


def _split(value: str) -> list[str]:
    """At commas, but not in brackets or parentheses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(value):
        if character in "[(":
            depth += 1
        elif character in "])":
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append(value[start:position])
            start = position + 1
    return [*parts, value[start:]]


def _steps(text: str) -> list[str]:
    """ "1~3,2*2" -> 1, 2, 3, 2 (repeats are one picture)."""
    steps: list[str] = []
    for item in text.split(","):
        item = item.split("*")[0].strip()
        first, tilde, last = item.partition("~")
        if tilde and len(first) < 4 and len(last) < 4 and first.isdecimal() and last.isdecimal():
            low, high = int(first), int(last)
            numbers = range(low, high + 1) if low <= high else range(low, high - 1, -1)
            steps.extend(str(number).zfill(len(first)) for number in numbers)
        else:
            steps.append(item)
    return steps[:_MAX_FRAMES]


def _animation_frames(layer: Node) -> Iterator[str]:
    """Images of all frames below `layer`, but not those of other looks of the type."""
    waiting = list(reversed(layer.children))
    while waiting:
        node = waiting.pop()
        if node.tag in _NO_POSE or node.tag in ("variation", "male", "female"):
            continue
        if node.tag == "frame":
            yield from frames(node.values.get("image", ""))
        waiting.extend(reversed(node.children))


def _belongs_to(image: str, standing: str) -> bool:
    one, other = PurePosixPath(image), PurePosixPath(standing)
    own = _NUMBER.sub("", other.stem)  # some stand in a numbered frame
    after = one.stem.removeprefix(own)
    named = one.stem.startswith(own) and (not after or after[0] in "-_" or after[0].isdigit())
    return one.parent == other.parent and named and "-die" not in one.stem and "-death" not in one.stem
