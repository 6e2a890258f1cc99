"""Campaigns as stories: lines of dialogue in order, and who says them.

A story is a run of messages that the game shows one after another; a branch (`[then]`, `[option]`) is a story of its
own. A window is three lines in a row whose speakers are known characters with sprites. Narration has no speaker,
generic speakers (`role=...`) no certain one: both end a run, and are counted.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from samtrain.data.mini.stories.units import UnitTypes
from samtrain.data.mini.stories.wml import FileTree, Node, Reader, WmlError

WINDOW = 3
MIN_TARGET_WORDS = 4  # "Argh!" is no third line to write
MAX_WORDS = 50  # of any line
_NO_STORY = frozenset({"Tutorial"})  # tells how to click
_MARKUP = re.compile(r"<[^<>]{0,200}>")
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "\u00a0": " "})


@dataclass(frozen=True)
class Speaker:
    """A character. sprites: names of its poses' files in the tree, the standing one first. side: its army, from 1."""

    id: str
    name: str
    unit_type: str
    sprites: tuple[str, ...]
    side: int


@dataclass(frozen=True)
class Line:
    speaker: Speaker
    text: str


@dataclass(frozen=True)
class Window:
    """Three lines in a row. story: which run of messages of which scenario they are from."""

    campaign: str
    scenario: str
    story: str
    lines: tuple[Line, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(line.text for line in self.lines)


@dataclass
class Campaign:
    """What one campaign holds. lines: what became of its messages. skipped: file -> why it was not read."""

    id: str
    name: str
    folder: str
    authors: tuple[str, ...]
    windows: list[Window] = field(default_factory=list)
    lines: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    num_files: int = 0


@dataclass
class Library:
    """All campaigns of a tree, by folder; `skipped` are files that belong to none of them, or campaigns as a whole."""

    campaigns: list[Campaign]
    num_unit_types: int
    skipped: dict[str, str]


def read_library(tree: FileTree) -> Library:
    """Read every campaign below `campaigns/`."""
    core = Reader(tree, symbols=frozenset({"NORMAL"}))
    core.include("core/macros")
    units = core.with_symbols()
    units.include("core/units.cfg")
    types = UnitTypes(document.root for document in units.documents)
    library = Library([], len(types), core.skipped | units.skipped)
    for folder in tree.folders("campaigns"):
        try:
            campaign = _read_campaign(folder, core, types)
        except WmlError as error:
            library.skipped[folder] = str(error)
        else:
            if campaign is not None:
                library.campaigns.append(campaign)
    return library


def _read_campaign(folder: str, core: Reader, core_types: UnitTypes) -> Campaign | None:
    """One campaign, or None where the folder holds none with a story.

    Raises:
        WmlError: its main file cannot be read.
    """
    main = f"{folder}/_main.cfg"
    if not core.tree.find(main):
        return None
    card = core.with_symbols()
    card.include(main)  # its symbol is not defined yet, so nothing but the campaign's card is read
    if main in card.skipped:
        raise WmlError(f"_main.cfg: {card.skipped[main]}")
    about = next((node for document in card.documents for node in document.root.walk() if node.tag == "campaign"), None)
    if about is None or not about.values.get("id") or about.values["id"] in _NO_STORY:
        return None
    reader = core.with_symbols(about.values.get("define", ""))
    reader.include(main)
    roots = [document.root for document in reader.documents]
    types = core_types.copy()
    types.add(roots)
    authors = (entry.values.get("name", "") for node in about.walk() if node.tag == "about" for entry in node.children)
    campaign = Campaign(
        id=about.values["id"],
        name=_plain(about.values.get("name", about.values["id"])),
        folder=folder,
        authors=tuple(dict.fromkeys(name for author in authors if (name := _plain(author)))),
        skipped=reader.skipped,
        num_files=len(reader.documents),
    )
    casting = _Casting(core.tree, folder, types)
    everywhere: dict[str, Speaker] = {}
    for root in roots:
        everywhere = casting.cast(root) | everywhere
    seen: set[tuple[str, ...]] = set()
    for document in reader.documents:
        for scope in document.root.children:
            cast = everywhere | casting.cast(scope)
            scenario = scope.values.get("id", "") if scope.tag == "scenario" else ""
            for number, run in enumerate(_runs(scope, cast, campaign.lines)):
                for start in range(len(run) - WINDOW + 1):
                    story = f"{document.path.removeprefix(folder + '/')}#{number}"
                    window = Window(campaign.id, scenario, story, tuple(run[start : start + WINDOW]))
                    if window.texts in seen or len(window.texts[-1].split()) < MIN_TARGET_WORDS:
                        continue
                    seen.add(window.texts)
                    campaign.windows.append(window)
    return campaign


class _Casting:
    """Who is who: characters of WML nodes, with the sprites that exist."""

    def __init__(self, tree: FileTree, folder: str, types: UnitTypes) -> None:
        self.tree = tree
        self.image_folders = (f"{folder}/images", "core/images")
        self.types = types
        self._sprites: dict[tuple[str, str, str], tuple[str, ...]] = {}

    def cast(self, root: Node) -> dict[str, Speaker]:
        """Id -> character, of all sides and units below `root` (itself included); the first of an id counts."""
        found: dict[str, Speaker] = {}
        waiting = [(root, 1)]
        while waiting:
            node, side = waiting.pop()
            values = node.values
            if node.tag in ("side", "unit", "leader"):
                given = values.get("side", "")
                side = int(given) if given.isdecimal() and len(given) < 3 else side
                speaker = self._speaker(values, side)
                if speaker is not None:
                    found.setdefault(speaker.id, speaker)
            waiting.extend((child, side) for child in reversed(node.children))
        return found

    def _speaker(self, values: dict[str, str], side: int) -> Speaker | None:
        identity = values.get("id", "").strip()
        if not identity or "$" in identity:
            return None
        for unit_type in values.get("type", "").split(","):
            key = (unit_type.strip(), values.get("gender", ""), values.get("variation", ""))
            if key not in self._sprites:
                self._sprites[key] = self._find_sprites(*key)
            if sprites := self._sprites[key]:
                name = _plain(values.get("name", "")) or identity
                return Speaker(identity, name, key[0], sprites, side)
        return None

    def _find_sprites(self, unit_type: str, gender: str, variation: str) -> tuple[str, ...]:
        look = self.types.look(unit_type, gender=gender, variation=variation)
        if look is None:
            return ()
        candidates = ([f"{folder}/{pose}" for folder in self.image_folders] for pose in look.poses)
        return tuple(name for names in candidates if (name := next(filter(self._is_file, names), "")))

    def _is_file(self, name: str) -> bool:
        path = self.tree.find(name)
        return path is not None and path.is_file()


@dataclass(frozen=True)
class _Event:
    """Who `unit` and `second_unit` are where an event names them."""

    unit: str = ""
    second_unit: str = ""


def _runs(scope: Node, cast: dict[str, Speaker], counts: Counter[str]) -> Iterator[list[Line]]:
    """The runs of usable lines below `scope`; `counts` gets a word for every message."""
    waiting = [(scope, _Event())]
    while waiting:
        node, event = waiting.pop()
        if node.tag == "event":
            event = _Event(_filtered_id(node, "filter"), _filtered_id(node, "filter_second"))
        run: list[Line] = []
        inner = []
        for child in node.children:
            if child.tag != "message":
                if _has_messages(child):
                    inner.append((child, event))
                    yield run
                    run = []
                continue
            line, verdict = _line(child, event, cast)
            counts[verdict] += 1
            if line is None:
                yield run
                run = []
            else:
                run.append(line)
            if _has_messages(child):  # below its options; what comes next depends on the choice
                inner.append((child, event))
                yield run
                run = []
        yield run
        waiting.extend(reversed(inner))


def _line(message: Node, event: _Event, cast: dict[str, Speaker]) -> tuple[Line | None, str]:
    """The line, and what became of the message in a word."""
    values = message.values
    text = _plain(next((values[key] for key in ("message", "male_message", "female_message") if values.get(key)), ""))
    speaker_id = values.get("speaker", "") or values.get("id", "")
    speaker_id = {"unit": event.unit, "second_unit": event.second_unit}.get(speaker_id, speaker_id)
    if speaker_id == "narrator":
        return None, "narration"
    speaker = cast.get(speaker_id)
    if speaker is None:
        return None, "speaker or sprite unknown"
    if not text or "$" in text:
        return None, "text with variables, or none"
    if len(text.split()) > MAX_WORDS:
        return None, f"longer than {MAX_WORDS} words"
    return Line(speaker, text), "used"


def _filtered_id(event: Node, tag: str) -> str:
    found = event.first(tag)
    return found.values.get("id", "") if found else ""


def _has_messages(node: Node) -> bool:
    return any(below.tag == "message" for child in node.children for below in child.walk()) or (
        node.tag != "message" and any(child.tag == "message" for child in node.children)
    )


def _plain(text: str) -> str:
    """Without markup, translation hints and typographic signs, on one line."""
    text = html.unescape(_MARKUP.sub("", text.split("^", 1)[-1]))
    return " ".join(_MARKUP.sub("", text).translate(_PLAIN).split())
