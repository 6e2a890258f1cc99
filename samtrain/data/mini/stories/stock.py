"""What stories are made of, taken out of the installed game once: windows of each split, sprites, landscapes.

The stock is one zip file that exists while a set is built. Processes that compose pictures read it and nothing else,
so what is in the game's folder is opened, checked and limited in one place.

Roles are by hash, whatever is installed: a campaign's stories belong to one split, a landscape to training or test.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data.mini.stories.campaigns import Library, Line, Speaker, Window
from samtrain.data.mini.stories.wml import FileTree, Reader
from samtrain.data.mini.vocabulary import stable_fraction

TRAIN, VALIDATION, TEST = "train_story", "validation_story", "test_story"
STORY_SPLITS = (TRAIN, VALIDATION, TEST)
LANDSCAPE_HEIGHT = 300
_MAX_IMAGE_BYTES = 20_000_000
_MAX_IMAGE_PIXELS = 16_000_000
_MAX_SPRITE_SIDE = 400
_MIN_DRAWN_PIXELS = 150
_MIN_OF_STANDING = 0.4  # a pose that shows less of the unit than this part of its standing picture fades
_WITH_FIGURES = frozenset({"landscape-battlefield", "landscape-coast", "landscape-hills-02"})  # somebody is there
_TABLE = "stories.json"

Color = tuple[int, int, int]
Progress = Callable[[str, int, int], None]


class UnusableStories(DataError):
    """The game is there, but nothing can be told from it; the message says what is missing."""


@dataclass(frozen=True)
class StoryFacts:
    """What the report says about a stock."""

    digest: str
    windows: dict[str, int]
    campaigns: dict[str, list[str]]
    landscapes: dict[str, list[str]]
    num_sprites: int
    skipped: dict[str, str]


def campaign_split(campaign: str) -> str:
    """Which split a campaign's stories are in: about 70 % train, 10 % validate, 20 % test."""
    fraction = stable_fraction("campaigns", campaign)
    return TEST if fraction < 0.2 else VALIDATION if fraction < 0.3 else TRAIN


def is_held_out_landscape(name: str) -> bool:
    """Whether only tests show this landscape; variants of one view (`NAME_sun`) stay together."""
    return stable_fraction("landscape", PurePosixPath(name).stem.split("_")[0]) < 0.25


def write_stock(path: Path, tree: FileTree, library: Library, *, progress: Progress) -> StoryFacts:
    """Write the stock of everything that can be told; what cannot be used is left out and listed.

    Raises:
        UnusableStories: no window or no landscape is left.
    """
    skipped = dict(library.skipped)
    for campaign in library.campaigns:
        skipped |= campaign.skipped
    splits = _split_windows(library)
    content: dict[str, bytes] = {}
    usable = _take_sprites(tree, splits, content, skipped, progress)
    splits = {split: _recast(windows, usable) for split, windows in splits.items()}
    landscapes = _take_landscapes(tree, content, skipped)
    if not any(splits.values()):
        raise UnusableStories("no campaign with dialogue of characters that have sprites is installed")
    for held_out, names in landscapes.items():
        if not names:
            raise UnusableStories(f"no landscape for {held_out} in core/images/story")
    colours, more_skipped = team_colours(tree)
    skipped |= more_skipped
    table = {
        "windows": {split: [asdict(window) for window in windows] for split, windows in splits.items()},
        "landscapes": landscapes,
        "colours": colours,
    }
    content[_TABLE] = json.dumps(table, ensure_ascii=False, sort_keys=True).encode()
    digest = hashlib.sha256()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(content.items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            archive.writestr(zipfile.ZipInfo(name), data)
    return StoryFacts(
        digest=digest.hexdigest(),
        windows={split: len(windows) for split, windows in splits.items()},
        campaigns={
            split: list(dict.fromkeys(window.campaign for window in windows)) for split, windows in splits.items()
        },
        landscapes=landscapes,
        num_sprites=len(set().union(*usable.values())) if usable else 0,
        skipped=skipped,
    )


class StoryStock:
    """Read access to a stock; cheap to open in every process."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        table = json.loads(self._archive.read(_TABLE))
        self.windows = {split: [_window(values) for values in rows] for split, rows in table["windows"].items()}
        self.landscapes: dict[str, list[str]] = table["landscapes"]
        self._colours = table["colours"]
        self.sprite = lru_cache(maxsize=2048)(self._sprite)  # about 40 MB
        self.landscape = lru_cache(maxsize=64)(self._landscape)

    def _sprite(self, name: str, side: int) -> Image.Image:
        """RGBA, cropped to what is drawn, in the colours of its army. Shared: do not change it in place."""
        image = Image.open(io.BytesIO(self._archive.read(name))).convert("RGBA")
        ranges = self._colours["ranges"]
        return recoloured(image, self._colours["palette"], ranges[(side - 1) % len(ranges)]) if ranges else image

    def _landscape(self, name: str) -> Image.Image:
        """RGB, `LANDSCAPE_HEIGHT` pixels high. Shared: do not change it in place."""
        return Image.open(io.BytesIO(self._archive.read(name))).convert("RGB")


def recoloured(image: Image.Image, palette: list[Color], colour_range: list[Color]) -> Image.Image:
    """The RGBA image with its team colours (exactly the palette's, the first the average one) moved to a range.

    colour_range: average, lightest, darkest. A colour darker than the palette's average becomes a mixture of the
    range's average and darkest, a lighter one of its average and lightest, as the game does.
    """
    pixels = np.array(image)
    key = pixels[..., 0].astype(np.int32) << 16 | pixels[..., 1].astype(np.int32) << 8 | pixels[..., 2]
    average, lightest, darkest = (np.array(colour, dtype=np.float64) for colour in colour_range)
    reference = sum(palette[0]) / 3
    for red, green, blue in palette:
        brightness = (red + green + blue) / 3
        if brightness <= reference:
            part = brightness / reference
            mixed = part * average + (1 - part) * darkest
        else:
            part = (255 - brightness) / (255 - reference)
            mixed = part * average + (1 - part) * lightest
        pixels[key == (red << 16 | green << 8 | blue), :3] = np.clip(mixed, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def _split_windows(library: Library) -> dict[str, list[Window]]:
    """Windows by split; what is told in training and told again elsewhere is not told there."""
    splits: dict[str, list[Window]] = {split: [] for split in STORY_SPLITS}
    for campaign in library.campaigns:
        splits[campaign_split(campaign.id)].extend(campaign.windows)
    told: set[str] = set()
    for split in STORY_SPLITS:
        splits[split] = [window for window in splits[split] if window.texts[-1] not in told]
        told.update(text for window in splits[split] for text in window.texts)
    return splits


def _take_sprites(
    tree: FileTree,
    splits: dict[str, list[Window]],
    content: dict[str, bytes],
    skipped: dict[str, str],
    progress: Progress,
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Read every sprite once; returns which of a character's sprites can be used."""
    casts = dict.fromkeys(
        line.speaker.sprites for windows in splits.values() for window in windows for line in window.lines
    )
    drawn: dict[str, int] = {}
    for done, sprites in enumerate(casts):
        progress("reading sprites", done, len(casts))
        for name in sprites:
            if name in drawn or name in skipped:
                continue
            try:
                sprite = _open_image(tree, name, formats=("PNG", "WEBP")).convert("RGBA")
                if max(sprite.size) > _MAX_SPRITE_SIDE:
                    raise ValueError(f"{sprite.width} x {sprite.height} pixels, more than {_MAX_SPRITE_SIDE}")
                opaque = sprite.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
                count = opaque.histogram()[255]
                if count < _MIN_DRAWN_PIXELS:
                    raise ValueError(f"draws {count} pixels, fewer than {_MIN_DRAWN_PIXELS}")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                skipped[name] = str(error)
                continue
            drawn[name] = count
            content[name] = _png(sprite.crop(opaque.getbbox()))
    usable = {}
    for sprites in casts:
        standing = drawn.get(sprites[0], 0)
        usable[sprites] = tuple(name for name in sprites if drawn.get(name, 0) > _MIN_OF_STANDING * standing)
    kept = set().union(*usable.values()) if usable else set()
    for name in drawn:
        if name not in kept:
            del content[name]
    return usable


def _recast(windows: list[Window], usable: dict[tuple[str, ...], tuple[str, ...]]) -> list[Window]:
    """The windows whose speakers all have a sprite left, with those sprites."""
    recast = []
    for window in windows:
        lines = tuple(
            Line(replace(line.speaker, sprites=usable[line.speaker.sprites]), line.text) for line in window.lines
        )
        if all(line.speaker.sprites for line in lines):
            recast.append(replace(window, lines=lines))
    return recast


def _take_landscapes(tree: FileTree, content: dict[str, bytes], skipped: dict[str, str]) -> dict[str, list[str]]:
    landscapes: dict[str, list[str]] = {"train": [], "test": []}
    for suffix in (".jpg", ".png", ".webp"):
        for name in tree.names("core/images/story", suffix):
            if PurePosixPath(name).stem in _WITH_FIGURES:
                continue
            try:
                image = _open_image(tree, name, formats=("JPEG", "PNG", "WEBP")).convert("RGB")
                width = round(image.width * LANDSCAPE_HEIGHT / image.height)
                if not LANDSCAPE_HEIGHT // 2 <= width <= 4 * LANDSCAPE_HEIGHT:
                    raise ValueError(f"{image.width} x {image.height} pixels are no landscape")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                skipped[name] = str(error)
                continue
            content[name] = _png(image.resize((width, LANDSCAPE_HEIGHT), Image.Resampling.LANCZOS))
            landscapes["test" if is_held_out_landscape(name) else "train"].append(name)
    return landscapes


def _open_image(tree: FileTree, name: str, *, formats: tuple[str, ...]) -> Image.Image:
    """Raises OSError or ValueError where it is no image of those formats, or too large."""
    path = tree.find(name)
    if path is None or not path.is_file():
        raise ValueError("no such file")
    if path.stat().st_size > _MAX_IMAGE_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, more than {_MAX_IMAGE_BYTES}")
    with Image.open(path, formats=formats) as image:
        if image.width * image.height > _MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {_MAX_IMAGE_PIXELS}")
        image.load()
        return image.copy()


def team_colours(tree: FileTree) -> tuple[dict[str, Any], dict[str, str]]:
    """The palette that sprites are painted in, and the ranges of the armies 1, 2, ...; empty where nothing says."""
    reader = Reader(tree)
    reader.include("core/team-colors.cfg")
    palette: list[Color] = []
    ranges: list[list[Color]] = []
    try:
        for node in (node for document in reader.documents for node in document.root.walk()):
            if node.tag == "color_palette" and "magenta" in node.values:
                palette = [_colour(text) for text in node.values["magenta"].split(",")]
            elif node.tag == "color_range" and node.values.get("default") == "yes":
                ranges.append([_colour(text) for text in node.values["rgb"].split(",")[:3]])
        if not palette or any(len(colours) != 3 for colours in ranges) or not 0 < sum(palette[0]) < 3 * 255:
            raise ValueError("no palette `magenta`, or a range without three colours")
    except (KeyError, ValueError) as error:
        reader.skipped.setdefault("core/team-colors.cfg", f"no team colours: {error}")
        palette, ranges = [], []
    return {"palette": palette, "ranges": ranges}, reader.skipped


def _colour(text: str) -> Color:
    value = int(text.strip(), 16)
    if not 0 <= value < 1 << 24:
        raise ValueError(f"{text} is no colour")
    return value >> 16, value >> 8 & 255, value & 255


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def _window(values: dict[str, Any]) -> Window:
    lines = tuple(
        Line(Speaker(**line["speaker"] | {"sprites": tuple(line["speaker"]["sprites"])}), line["text"])
        for line in values["lines"]
    )
    return Window(values["campaign"], values["scenario"], values["story"], lines)
