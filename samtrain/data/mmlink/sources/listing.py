"""What a source gives: pictures by reference, whom to thank, and what it could not use."""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.data.mmlink.records import Locator, SourcePicture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Progress = Callable[[str, int, int], None]


@dataclass
class Listing:
    """kind: of the source. credits: rows of the attribution. skipped: file -> why. note: why it is empty, if it is."""

    kind: str
    pictures: list[SourcePicture] = field(default_factory=list)
    credits: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "kind": self.kind,
            "pictures": len(self.pictures),
            "identities": len({picture.identity for picture in self.pictures}),
            "skipped": {"count": len(self.skipped), "files": dict(sorted(self.skipped.items())[:50])},
            **({"note": self.note} if self.note else {}),
        }


def credit(
    *, source: str, title: str, author: str, licence: str, homepage: str = "", licence_url: str = "", version: str = ""
) -> dict[str, Any]:
    """A row of the attribution, as mmlink-mini writes them."""
    return {
        "style": source,
        "package": title,
        "version": version,
        "integrity": "",
        "title": title,
        "author": author,
        "homepage": homepage,
        "licence": licence,
        "licence_url": licence_url,
        "changes": "segmented, scaled, rotated, mirrored, placed on other backgrounds",
    }


def file_locator(path: Path) -> Locator:
    """A file, with size and time of its content."""
    stat = path.stat()
    return Locator("file", str(path), signature=f"{stat.st_size}-{stat.st_mtime_ns}")


def picture_files(root: Path) -> Iterator[Path]:
    """Pictures below `root`, in order of their names; links that lead out of it are not followed."""
    inside = root.resolve()
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and inside in path.resolve().parents:
            yield path


def existing_folder(path: str | Path, *, where: str) -> Path:
    """Raises DataError where there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{where}: {folder} is no folder")
    return folder.absolute()


def words_of(file_name: str) -> str:
    """ "grey_sofa-02" -> "grey sofa": what a file's or folder's name says."""
    text = unicodedata.normalize("NFC", Path(file_name).stem)
    words = [word for word in text.replace("_", " ").replace("-", " ").split() if not word.isdecimal()]
    return " ".join(words)
