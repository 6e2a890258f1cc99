"""What travels between the stages: source pictures, jobs and their results. All JSON-able."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from samtrain.data.mini.vocabulary import stable_fraction

OBJECT, ICON, COVER, BACKGROUND = "object", "icon", "cover", "background"
_STOP = frozenset(
    re.split(
        r",\s*", "a, an, the, of, in, on, with, and, or, for, to, at, by, from, two, three, pair, set, its, some, piece"
    )
)
_JOINTS = re.compile(r"\b(?:of|with|in|on|from|for|at|by|and)\b")


class Rejected(Exception):
    """This item cannot be used, and never will be with these settings; the message says why. Kept as a result."""


class Failed(Exception):
    """This item could not be done this time (a server, a time-out); another run tries it again."""


@dataclass(frozen=True)
class Locator:
    """Where the bytes of a picture are. kind: "file" (path), "zip" (member of path), "drawn" (made from `member`)."""

    kind: str
    path: str
    member: str = ""
    signature: str = ""  # changes when the bytes do: size and time of a file, checksum of a member


@dataclass(frozen=True)
class SourcePicture:
    """One picture of a source.

    id: unique in the build. identity: what it shows; split and pairing go by it. pose: which view of it. name: with its
    article ("a red fox"). facts: what a domain needs besides (title, author and genre of a cover; licence; mirror).
    """

    id: str
    role: str
    identity: str
    pose: str
    name: str
    category: str
    caption: str
    source: str
    locator: Locator
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "SourcePicture":
        return SourcePicture(**values | {"locator": Locator(**values["locator"])})


@dataclass(frozen=True)
class Job:
    """One item of a stage. key: of its result; a digest of everything the result depends on."""

    key: str
    payload: dict[str, Any]


def digest(*parts: Any) -> str:
    """32 hex digits that depend on every part (anything JSON)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content_words(name: str) -> frozenset[str]:
    """The words of a name that say what it is: "a slice of red melon" -> {slice, red, melon}."""
    return frozenset(_singular(word) for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in _STOP)


def head_word(name: str) -> str:
    """What a name is about: "an Elvish archer" -> archer, "a mug of beer" -> mug."""
    words = re.findall(r"[a-z0-9]+", _JOINTS.split(name.lower(), maxsplit=1)[0])
    return _singular(words[-1]) if words else name.lower()


def split_of(group: str, shares: dict[str, float]) -> str:
    """The split a group of identities belongs to: a matter of its name alone, whatever else is in the build."""
    position = stable_fraction("mmlink split", group) * sum(shares.values())
    for split, share in shares.items():
        position -= share
        if position < 0:
            return split
    return next(iter(shares))


def with_article(name: str) -> str:
    """ "gray sofa" -> "a gray sofa"; what has an article or is a proper name keeps its form."""
    name = " ".join(name.split())
    if not name or name.lower().startswith(("a ", "an ", "the ", "some ", "two ", "three ")) or name[0].isupper():
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")) else word
