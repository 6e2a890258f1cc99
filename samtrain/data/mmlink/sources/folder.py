"""One's own pictures.

Without metadata, `path/IDENTITY/POSE.jpg`: every sub-folder is one thing, its files are views of it, and its name is
what the thing is called ("gray-sofa"). Backgrounds and icons may lie in `path` itself.

With `path/metadata.jsonl`, one line per picture: {"file": "a/1.jpg", "identity": "sofa-17", "pose": "front",
"name": "a gray sofa", "category": "furniture", "caption": "...", "plural": false, "mirror": true,
"title": ..., "author": ..., "genre": ..., "licence": ..., "credit": ...}; only `file` is required (and `title`,
`author` or `genre` for covers).
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from samtrain.core.errors import DataError
from samtrain.data.mmlink.options import FolderOptions
from samtrain.data.mmlink.records import BACKGROUND, COVER, SourcePicture, with_article
from samtrain.data.mmlink.sources.listing import (
    Listing,
    Progress,
    credit,
    existing_folder,
    file_locator,
    picture_files,
    words_of,
)

METADATA = "metadata.jsonl"
_TEXTS = ("identity", "pose", "name", "category", "caption", "title", "author", "genre", "licence", "credit")
_FLAGS = ("plural", "mirror")
_MAX_TEXT = 500
_MAX_LINES = 10_000_000


def collect(options: FolderOptions, *, where: str, cache: Path, progress: Progress) -> Listing:
    """Raises DataError where the folder or its metadata cannot be used as a whole; single pictures are listed."""
    root = existing_folder(options.path, where=f"{where}.path")
    listing = Listing("folder")
    described = _read_metadata(root / METADATA, listing) if (root / METADATA).is_file() else None
    if described is None:
        described = {path.relative_to(root).as_posix(): {} for path in picture_files(root)}
    for name, facts in described.items():
        try:
            listing.pictures.append(_picture(root, name, facts, options))
        except ValueError as error:
            listing.skipped[name] = str(error)
    if not listing.pictures:
        raise DataError(
            f"{where}.path: {root} has no usable picture (expected IDENTITY/POSE.jpg or {METADATA})"
            + "".join(f"; {name}: {why}" for name, why in list(listing.skipped.items())[:3])
        )
    listing.credits.append(
        credit(
            source=root.name,
            title=options.title or root.name,
            author=options.author or "(see the pictures' own rows)",
            licence=options.licence or "(see the pictures' own rows)",
        )
    )
    return listing


def _read_metadata(path: Path, listing: Listing) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    with open(path, encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if number > _MAX_LINES:
                    raise DataError(f"{path}: more than {_MAX_LINES} lines")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    name = _checked(row)
                    if name in described:
                        raise ValueError(f"{name} has a line already")
                    described[name] = row
                except (ValueError, RecursionError) as error:
                    listing.skipped[f"{path.name}:{number}"] = str(error)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error}") from None
    return described


def _checked(row: Any) -> str:
    """The file of a line of metadata. Raises ValueError where a value is wrong."""
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        raise ValueError('no mapping with a "file"')
    for key, value in row.items():
        if key == "file":
            continue
        if key in _TEXTS:
            if not isinstance(value, str) or len(value) > _MAX_TEXT:
                raise ValueError(f"{key} is not text of at most {_MAX_TEXT} characters")
        elif key in _FLAGS:
            if not isinstance(value, bool):
                raise ValueError(f"{key} is not true or false")
        else:
            raise ValueError(f"unknown key {key!r}; known: file, {', '.join((*_TEXTS, *_FLAGS))}")
    return str(row["file"])


def _picture(root: Path, name: str, facts: dict[str, Any], options: FolderOptions) -> SourcePicture:
    relative = PurePosixPath(name)
    path = root / relative
    if relative.is_absolute() or ".." in relative.parts or root.resolve() not in path.resolve().parents:
        raise ValueError("leads out of the folder")
    if not path.is_file():
        raise ValueError("no such file")
    parent = relative.parent.as_posix()
    in_folder = parent not in (".", "")
    called = words_of(relative.parent.name if in_folder else relative.name)
    if options.role == COVER and not (facts.get("author") or facts.get("genre")):
        raise ValueError("a cover needs its author or genre in metadata.jsonl")
    spoken = facts.get("name") or (called if options.role == BACKGROUND else with_article(called))
    identity = facts.get("identity") or (parent if in_folder else relative.stem)
    if options.role == COVER:
        identity = facts.get("author") or identity
    kept = {key: facts[key] for key in (*_FLAGS, "title", "author", "genre", "licence", "credit") if key in facts}
    return SourcePicture(
        id=f"{root.name}/{name}",
        role=options.role,
        identity=f"{root.name}/{identity}",
        pose=facts.get("pose") or relative.stem,
        name=spoken,
        category=facts.get("category") or options.category,
        caption=facts.get("caption", ""),
        source=root.name,
        locator=file_locator(path),
        facts=kept,
    )
