"""Where pictures come from. Each source lists what it has; nothing is decoded before the first stage reads it.

folder (one's own pictures), emoji (npm packages, as mmlink-mini), sprites and stamps (Debian packages), photographs
(backgrounds), covers (typeset here).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.data.mmlink.options import Choice
from samtrain.data.mmlink.sources import covers, emoji, folder, photographs, sprites, stamps
from samtrain.data.mmlink.sources.listing import Listing, Progress

_COLLECTORS: dict[str, Callable[..., Listing]] = {
    "folder": folder.collect,
    "emoji": emoji.collect,
    "sprites": sprites.collect,
    "stamps": stamps.collect,
    "photographs": photographs.collect,
    "drawn-covers": covers.collect,
}


def collect(choices: tuple[Choice, ...], *, cache: Path, progress: Progress) -> list[Listing]:
    """The listings of all sources, in the order of the configuration.

    Raises:
        DataError: a required source is not there, or two sources give one id.
    """
    listings: list[Listing] = []
    seen: dict[str, str] = {}
    for i, choice in enumerate(choices):
        options: Any = choice.options
        listing = _COLLECTORS[choice.kind](options, where=f"sources[{i}]", cache=cache, progress=progress)
        for picture in listing.pictures:
            if picture.id in seen:
                raise DataError(f"sources[{i}]: picture {picture.id} is in {seen[picture.id]} too; list a folder once")
            seen[picture.id] = f"sources[{i}]"
        listings.append(listing)
    return listings
