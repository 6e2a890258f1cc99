"""Read the layout of one webdataset tar: which bytes belong to which sample.

The only place that walks a tar; at run time samples are read by the offsets found here. Every record is
parsed and every image it names must be a member, so a broken set is refused when it is indexed, not at step 9,000.
"""

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord
from samtrain.data.index import Extent, SampleEntry, check_record_size

# No dot: webdataset splits key and extension at the first one. No "..", no backslash, no absolute path.
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
MAX_KEY_LENGTH = 80  # a tar header holds names of 100 bytes
_BLOCK = 512


def check_key(key: str, *, where: str) -> None:
    """Refuse keys that are no safe file names for webdataset."""
    if not isinstance(key, str) or len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise DataError(
            f"{where}: key {key!r} is not allowed; use letters, digits, `_`, `-` and `/` between them, "
            f"at most {MAX_KEY_LENGTH} characters"
        )


@dataclass
class _Group:
    """Members of one key, in tar order."""

    key: str
    start: int  # of the first header
    stop: int  # after the last member's padding
    members: dict[str, Extent]


def scan_shard(path: Path, number: int) -> list[SampleEntry]:
    """Entries of the samples in `path`, the set's shard `number`, in tar order.

    Raises:
        DataError: naming the tar, the key and what is wrong.
    """
    with open(path, "rb") as stream:
        groups = _groups(path, stream)
        return [_entry(path, number, group, stream) for group in groups]


def _groups(path: Path, stream: BinaryIO) -> list[_Group]:
    groups: list[_Group] = []
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: {name}: not a plain file; links are never followed")
                folder, slash, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = folder + slash + stem
                check_key(key, where=str(path))
                if not groups or groups[-1].key != key:
                    if key in seen:
                        raise DataError(f"{path}: {key}: used twice, or its members are not next to each other")
                    seen.add(key)
                    groups.append(_Group(key, member.offset, 0, {}))
                group = groups[-1]
                if extension in group.members:
                    raise DataError(f"{path}: {key}: has two members .{extension}")
                group.members[extension] = (member.offset_data, member.size)
                group.stop = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            _check_end(path, stream, groups[-1].stop if groups else 0)
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole tar file ({error}); copy or build it again") from None
    return groups


def _check_end(path: Path, stream: BinaryIO, stop: int) -> None:
    """tarfile ends silently at a broken header or a cut between members; a whole tar ends with two zero blocks."""
    stream.seek(stop)
    marker = stream.read(2 * _BLOCK)
    if marker != bytes(2 * _BLOCK):
        raise DataError(f"{path}: no end-of-archive mark at byte {stop}: cut off or damaged; copy or build it again")


def _entry(path: Path, number: int, group: _Group, stream: BinaryIO) -> SampleEntry:
    where = f"{path}: {group.key}"
    if "json" not in group.members:
        raise DataError(f"{where}: has no member {group.key}.json; every sample needs its record")
    offset, size = group.members["json"]
    check_record_size((offset, size), where=where)
    stream.seek(offset)
    record = SampleRecord.from_json(stream.read(size), where=where)
    if record.key != group.key:
        raise DataError(f"{where}: its record says key {record.key!r}")
    images = []
    for image in record.images:
        extension = image.file.removeprefix(f"{group.key}.") if isinstance(image.file, str) else image.file
        if extension not in group.members:
            present = ", ".join(sorted(group.members))
            raise DataError(f"{where}: its record names image {image.file!r}, the tar has {present}")
        images.append(group.members[extension])
    return SampleEntry(
        key=record.key,
        task=record.task,
        shard=number,
        offset=group.start,
        size=group.stop - group.start,
        text_bytes=len(record.instruction.encode()) + len(record.output.encode()),
        record=(offset, size),
        images=tuple(images),
    )
