"""Every thing of the vocabulary, rendered once in every style: the stock that pictures are composed from.

The stock is one zip file in the cache: `STYLE/SLUG.png`, RGBA, cropped to what is drawn, longest side at most
`RENDER_SIZE` pixels. Its name holds a digest of all it was made from: a newer renderer or vocabulary makes another.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data import parallel
from samtrain.data.mini import sources
from samtrain.data.mini.vocabulary import KINDS, slug

RENDER_SIZE = 128
_MIN_DRAWN_PIXELS = 350  # fewer opaque pixels: the renderer met something it cannot draw
# Icons whose name is a label's but whose picture shows another thing or another view (looked at one by one).
_WRONG: frozenset[tuple[str, str]] = frozenset(
    {
        ("streamline-emojis", "turkey"),  # the flag
        ("emojione", "cricket"),  # the game
        ("noto-v1", "cricket"),
        ("fxemoji", "keyboard"),  # a piano's
        ("fxemoji", "window"),  # a program's
        ("fxemoji", "umbrella"),  # closed
        ("fxemoji", "sunglasses"),  # a face that wears them
        ("fxemoji", "game die"),  # a domino
        ("twemoji", "tennis"),  # the ball alone
        ("streamline-emojis", "tennis"),
    }
)

Progress = Callable[[str, int, int], None]


def render_stock(cache: Path, *, num_workers: int, progress: Progress) -> Path:
    """The stock's path; fetched and rendered if the cache does not hold it.

    Raises:
        DataError: sources cannot be fetched or verified, or the renderer is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise DataError("building mmlink-mini renders SVG with resvg-py: `pip install resvg-py==0.5.0`") from None
    labels = [label for kind in KINDS for label in kind.labels]
    recipe = [
        resvg_py.__version__,
        RENDER_SIZE,
        sorted(labels),
        sorted(_WRONG),
        [package.integrity for package in (*sources.STYLE_PACKAGES.values(), sources.EMOJIBASE)],
    ]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = cache / f"renders-{digest}.zip"
    if _is_whole(path):
        return path
    known = _emojibase_labels(cache)
    unknown = [label for label in labels if slug(label) not in known]
    assert not unknown, f"not labels of emojibase: {unknown}"
    jobs = []
    for done, (style, package) in enumerate(sources.STYLE_PACKAGES.items()):
        progress("fetching drawings", done, len(sources.STYLE_PACKAGES))
        icons = sources.read_member(sources.tarball(package, cache=cache), "package/icons.json")
        for label in labels:
            svg = _svg(icons, label)
            if svg is not None and (style, label) not in _WRONG:
                jobs.append((f"{style}/{slug(label)}.png", svg))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            rendered = parallel.ordered_map(_render, jobs, num_workers=num_workers)
            for done, (name, png) in enumerate(rendered):
                progress("rendering drawings", done, len(jobs))
                if png:
                    archive.writestr(zipfile.ZipInfo(name), png)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Stock:
    """Read access to the rendered drawings; cheap to open in every process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        self.names = frozenset(self._archive.namelist())
        self.sprite = lru_cache(maxsize=1024)(self._sprite)  # about 50 MB

    def styles(self, label: str) -> tuple[str, ...]:
        """The styles that draw `label`."""
        return tuple(style for style in sources.STYLE_PACKAGES if f"{style}/{slug(label)}.png" in self.names)

    def _sprite(self, label: str, style: str) -> Image.Image:
        """RGBA, cropped to the drawing. Shared: do not change it in place."""
        with Image.open(io.BytesIO(self._archive.read(f"{style}/{slug(label)}.png"))) as image:
            return image.convert("RGBA")


def _emojibase_labels(cache: Path) -> frozenset[str]:
    data = sources.read_member(sources.tarball(sources.EMOJIBASE, cache=cache), "package/en/data.json")
    return frozenset(slug(item["label"]) for item in data)


def _svg(icons: dict[str, Any], label: str) -> str | None:
    """The SVG document of the icon that carries `label`'s name, in one of the spellings the sets use."""
    name = slug(label)
    for candidate in (name, name.replace("-", ""), f"{name}-1", f"{name}-2"):
        icon = icons["icons"].get(candidate)
        if icon is None and candidate in icons.get("aliases", {}):
            alias = icons["aliases"][candidate]
            # An alias may also turn or mirror its parent; those few are not worth a transform here.
            icon = icons["icons"].get(alias["parent"]) if set(alias) == {"parent"} else None
        if icon is not None:
            box = [icon.get(k, icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
            view = " ".join(str(value) for value in box)
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{view}">{icon["body"]}</svg>'
            )
    return None


def _render(job: tuple[str, str]) -> tuple[str, bytes]:
    """(name, PNG) of one drawing; empty bytes where nothing visible came out."""
    import resvg_py

    name, svg = job
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, skip_system_fonts=True)
    except ValueError:
        return name, b""
    with Image.open(io.BytesIO(png)) as opened:
        image = opened.convert("RGBA")
    opaque = image.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
    box = opaque.getbbox()
    if box is None or opaque.histogram()[255] < _MIN_DRAWN_PIXELS:
        return name, b""
    stream = io.BytesIO()
    image.crop(box).save(stream, "PNG", compress_level=3)
    return name, stream.getvalue()


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except (FileNotFoundError, zipfile.BadZipFile):
        return False
