"""Tux Paint's stamps: cut-outs with alpha and a sentence that says what they are, many of them photographs.

Each is a picture of its own: two with one sentence ("A flower.") show two flowers, not one in two poses. So they serve
as the things beside A, and nothing of the same name is ever put into a sample with them.
"""

import re
from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.data.mmlink.options import StampsOptions
from samtrain.data.mmlink.records import OBJECT, SourcePicture
from samtrain.data.mmlink.sources.listing import Listing, Progress, credit, existing_folder, file_locator, picture_files

PLACE = Path("/usr/share/tuxpaint/stamps")
INSTALL = "`apt-get install --no-install-recommends tuxpaint-stamps-default` installs them on Debian"
# Letters, signs and parts of bodies are no things that stand beside others.
_LEFT_OUT = ("symbols/", "people/", "town/flags", "town/roadsigns", "cartoon/tux", "space/", "naturalforces")
_NAME = re.compile(r"(An?|Some)( [A-Za-z]+(['-][A-Za-z]+)*)+")
_MAX_SENTENCE = 300


def collect(options: StampsOptions, *, where: str, cache: Path, progress: Progress) -> Listing:
    """Raises DataError where the stamps are required, or a folder is named, and they are not there."""
    if options.path is None and not PLACE.is_dir():
        note = f"{PLACE} is not there; {INSTALL}"
        if options.required:
            raise DataError(f"{where} (stamps): {note}")
        return Listing("stamps", note=note)
    root = existing_folder(options.path or PLACE, where=f"{where}.path")
    listing = Listing("stamps")
    for path in picture_files(root):
        name = path.relative_to(root).as_posix()
        if name.startswith(_LEFT_OUT) or path.suffix != ".png":
            continue
        sentence = _sentence(path.with_suffix(".txt"))
        if sentence is None:
            listing.skipped[name] = "no sentence like `A red kangaroo.` beside it"
            continue
        called = sentence[0].lower() + sentence[1:]
        listing.pictures.append(
            SourcePicture(
                id=f"stamps/{name}",
                role=OBJECT,
                identity=f"stamps/{name}",
                pose=path.stem,
                name=called,
                category=name.split("/")[0],
                caption="",
                source="tuxpaint-stamps",
                locator=file_locator(path),
                facts={"plural": sentence.startswith("Some")},
            )
        )
    listing.credits.append(
        credit(
            source="tuxpaint-stamps",
            title="Tux Paint stamps",
            author="Bill Kendrick and contributors",
            licence="GPL-2.0-only",
            homepage="https://tuxpaint.org",
            licence_url="https://www.gnu.org/licenses/old-licenses/gpl-2.0.html",
        )
    )
    return listing


def _sentence(path: Path) -> str | None:
    """The English sentence, where it is the name of a thing."""
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.readline(_MAX_SENTENCE).strip().rstrip(".!")
    except (OSError, UnicodeDecodeError):
        return None
    return text if _NAME.fullmatch(text) and len(text.split()) <= 5 else None
