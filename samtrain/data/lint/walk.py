"""The members of a tar, also of a broken one.

`scan.py` refuses a tar at its first fault, as an index must; this goes on behind it, block by block to the next header
whose checksum is right, and tells what it passed over. Nothing is unpacked and no name becomes a path.
"""

import hashlib
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from samtrain.core.errors import DataError
from samtrain.data.index import Extent
from samtrain.data.scan import check_key

_BLOCK = 512
_CHUNK = 1 << 20


@dataclass
class WalkedSample:
    """The members of one key that lie together: extension -> extent. start, stop: bytes from header to padding."""

    key: str
    start: int
    stop: int = 0
    members: dict[str, Extent] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)  # (kind, reason)


@dataclass
class WalkedShard:
    """problems: (kind, reason) of the shard as a whole. size, sha256: of the file; empty where it cannot be read."""

    samples: list[WalkedSample] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    size: int = 0
    sha256: str = ""


def walk_shard(path: Path) -> WalkedShard:
    """Everything that can be found in the tar; never raises for what is in it."""
    found = WalkedShard()
    try:
        with open(path, "rb") as stream:
            found.size = os.fstat(stream.fileno()).st_size
            found.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            _walk(stream, found)
    except OSError as error:
        found.problems.append(("unreadable-shard", f"{type(error).__name__}: {error}"))
    if not found.samples and not found.problems:
        found.problems.append(("empty-shard", f"{found.size} bytes, no sample"))
    return found


def _walk(stream: BinaryIO, found: WalkedShard) -> None:
    end = 0  # of the last member, padding included
    stream.seek(0)
    try:
        # ignore_zeros: behind a damaged header the next whole one is found instead of ending there.
        with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all it has seen
                place = stream.tell()
                _check_gap(stream, end, member.offset, found)
                stop = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
                if member.size < 0 or stop <= member.offset:
                    found.problems.append(("damaged-shard", f"a member at byte {member.offset} claims an absurd size"))
                    return
                end = stop
                _add(member, stop, found)
                stream.seek(place)
    except (tarfile.TarError, ValueError, OverflowError, UnicodeError, EOFError) as error:
        if end <= found.size:
            found.problems.append(("damaged-shard", f"behind byte {end}: {error}"))
    _check_end(stream, end, found)


def _check_gap(stream: BinaryIO, start: int, stop: int, found: WalkedShard) -> None:
    """Between two members lies nothing; an end mark in between hides what follows from other readers."""
    if stop <= start:
        return
    what = "an end-of-archive mark, with members after it" if _is_zero(stream, start, stop) else "damaged"
    found.problems.append(("damaged-shard", f"bytes {start} to {stop}: {what}"))


def _is_zero(stream: BinaryIO, start: int, stop: int) -> bool:
    stream.seek(start)
    left = stop - start
    while left > 0:
        data = stream.read(min(_CHUNK, left))
        if not data:
            return True
        if data.strip(b"\0"):
            return False
        left -= len(data)
    return True


def _check_end(stream: BinaryIO, end: int, found: WalkedShard) -> None:
    """A whole tar ends with two zero blocks, and nothing else comes after the last member."""
    if end > found.size:
        found.problems.append(("damaged-shard", f"cut off: {found.size} bytes, its last member ends at {end}"))
    elif not _is_zero(stream, end, found.size):
        found.problems.append(("damaged-shard", f"bytes {end} to {found.size}: damaged"))
    elif found.size - end < 2 * _BLOCK and (found.size or found.samples):
        found.problems.append(("damaged-shard", f"no end-of-archive mark at byte {end}: cut off"))


def _add(member: tarfile.TarInfo, stop: int, found: WalkedShard) -> None:
    if member.isdir():
        return
    name = member.name.removeprefix("./")
    if not member.isreg() or member.issparse():
        found.problems.append(("not-a-file", f"{name!r} is a link, a device or sparse"))
        return
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    key = folder + slash + stem
    try:
        check_key(key, where=repr(name))
    except DataError as error:
        found.problems.append(("unsafe-name", str(error)))
        return
    if not found.samples or found.samples[-1].key != key:
        found.samples.append(WalkedSample(key, member.offset))
    sample = found.samples[-1]
    if extension in sample.members:
        sample.problems.append(("duplicate-member", f"{name!r} is there twice"))
        return
    sample.members[extension] = (member.offset_data, member.size)
    sample.stop = stop
