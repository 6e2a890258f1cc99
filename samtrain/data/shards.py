"""Shards: plain webdataset tars of multi-image samples, and the index beside them.

A sample `key` is the members `key.json` (a SampleRecord), `key.0.jpg`, `key.1.jpg`, ... and optional extras
(`key.0.mask.png`), one after another in one tar. `webdataset.WebDataset` reads the tars, `wids` opens
`index.json`. Bytes are deterministic (fixed times and owners), so equal input gives an equal digest.

A folder is finished or refused: shards carry a temporary name until the last one is whole, and the index is
written after them. Writing and indexing share one scanner, so an index always describes what is really there.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from samtrain.core.errors import DataError
from samtrain.core.files import atomic_write, atomic_write_json, sha256_file
from samtrain.core.sample import ImageRef, SampleRecord
from samtrain.data.index import INDEX_FILE, SAMPLES_FILE, ShardIndex, header_of
from samtrain.data.scan import check_key, scan_shard

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_EXTRA = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")
_TEMPORARY = ".partial"


class ShardWriter:
    """Write samples as `shard-000000.tar`, ... and their index; use as a context manager.

    Leaving the block normally publishes shards and index; leaving it by an exception removes what was written.

    Args:
        folder: made if missing; must not hold shards or an index yet.
        max_samples_per_shard, max_shard_bytes: a new shard starts when either is reached.

    Raises:
        DataError: the folder is taken, or a sample is wrong (its key is named).
    """

    def __init__(
        self, folder: str | Path, *, max_samples_per_shard: int = 500, max_shard_bytes: int = 512 * 1024**2
    ) -> None:
        self.folder = Path(folder)
        taken = [self.folder / INDEX_FILE, *self.folder.glob("*.tar")]
        if any(path.exists() for path in taken):
            raise DataError(f"{self.folder}: already holds shards or an index; choose another folder or delete them")
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"*.tar{_TEMPORARY}"):  # of a killed writer
            leftover.unlink()
        self.max_samples_per_shard = max_samples_per_shard
        self.max_shard_bytes = max_shard_bytes
        self._keys: set[str] = set()
        self._finished: list[Path] = []
        self._stream: io.BufferedWriter | None = None
        self._tar: Any = None
        self._num_in_shard = 0
        self._bytes_in_shard = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self.close()
        except BaseException:  # a full disk, as a rule
            self._abandon()
            raise

    def write(
        self,
        *,
        key: str,
        task: str,
        instruction: str,
        output: str,
        images: Sequence[bytes],
        source: str = "",
        meta: dict[str, Any] | None = None,
        extra: dict[str, bytes] | None = None,
    ) -> SampleRecord:
        """Add one sample and return its record.

        Args:
            images: encoded JPEG, PNG or WEBP files; stored byte for byte.
            extra: further members by name after the key, e.g. {"0.mask.png": ...}.

        Raises:
            DataError: a key used twice or unfit for a file name, an unknown image format, placeholders that disagree.
        """
        check_key(key, where=str(self.folder))
        if key in self._keys:
            raise DataError(f"{self.folder}: {key}: this key was written before; keys must be unique")
        members: dict[str, Any] = {}
        references = []
        for i, data in enumerate(images):
            extension, width, height = sniff_image(data, where=f"{key}: image {i}")
            members[f"{i}.{extension}"] = data
            references.append(ImageRef(f"{key}.{i}.{extension}", width, height, hashlib.sha256(data).hexdigest()))
        record = SampleRecord(key, task, instruction, output, tuple(references), source, meta or {})
        SampleRecord.from_json(record.to_json(), where=str(self.folder))
        for name, data in (extra or {}).items():
            if not _EXTRA.fullmatch(name) or name in members or name == "json":
                raise DataError(f"{key}: extra member {name!r} is taken or not like `0.mask.png` (lower case)")
            members[name] = data
        members["json"] = record.to_json().encode()
        self._add(key, members)
        self._keys.add(key)
        return record

    def close(self) -> ShardIndex:
        """Publish the shards, then the index."""
        self._close_shard()
        if not self._finished:
            raise DataError(f"{self.folder}: no sample was written")
        for i, path in enumerate(self._finished):
            self._finished[i] = path.rename(path.with_name(path.name.removesuffix(_TEMPORARY)))
        index = build_index(self.folder)
        self._finished = []
        return index

    def _abandon(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, which a full disk refuses again
            self._close_shard()
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
        for path in self._finished:
            path.unlink(missing_ok=True)
        if self._finished:
            for name in (SAMPLES_FILE, INDEX_FILE):
                (self.folder / name).unlink(missing_ok=True)
        self._finished = []

    def _add(self, key: str, members: dict[str, bytes]) -> None:
        full = self._num_in_shard >= self.max_samples_per_shard or self._bytes_in_shard >= self.max_shard_bytes
        if full:
            self._close_shard()
        if self._tar is None:
            self._open_shard()
        self._bytes_in_shard += self._tar.write({"__key__": key, **members})
        self._num_in_shard += 1

    def _open_shard(self) -> None:
        from webdataset import TarWriter

        path = self.folder / f"shard-{len(self._finished):06d}.tar{_TEMPORARY}"
        self._stream = open(path, "wb")  # noqa: SIM115 (closed by _close_shard)
        self._finished.append(path)
        self._tar = TarWriter(self._stream, encoder=False, compress=False, mtime=0, user="samtrain", group="samtrain")
        self._num_in_shard = self._bytes_in_shard = 0

    def _close_shard(self) -> None:
        if self._tar is not None and self._stream is not None:
            self._tar.close()
            self._stream.close()
            self._tar = self._stream = None


def build_index(folder: str | Path) -> ShardIndex:
    """(Re)build the index of a folder of webdataset tars, atomically; every record is checked.

    Raises:
        DataError: no tars, a truncated tar, a key used twice, a record that is wrong or names missing images.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: holds no *.tar; an index describes webdataset shards")
    lines: list[str] = []
    counts: list[int] = []
    where_is: dict[str, str] = {}
    for number, path in enumerate(paths):
        entries = scan_shard(path, number)
        counts.append(len(entries))
        for entry in entries:
            if entry.key in where_is:
                raise DataError(f"{path}: {entry.key}: this key is also in {where_is[entry.key]}; keys must be unique")
            where_is[entry.key] = path.name
            lines.append(entry.to_json())
    samples = ("\n".join(lines) + "\n").encode()
    shards = [
        {"url": path.name, "nsamples": count, "filesize": path.stat().st_size, "sha256": sha256_file(path)}
        for path, count in zip(paths, counts)
    ]
    # The header names the samples file's hash and is written last: together they are whole or refused.
    atomic_write(folder / SAMPLES_FILE, samples)
    atomic_write_json(folder / INDEX_FILE, header_of(shards, samples))
    return ShardIndex.load(folder)


def sniff_image(data: bytes, *, where: str) -> tuple[str, int, int]:
    """(extension, width, height) from the header, without decoding.

    Raises:
        DataError: not a JPEG, PNG or WEBP.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS)) as image:
            # A JPEG of several pictures (phones, Flickr) opens as MPO; readers see its first picture.
            name = "JPEG" if image.format == "MPO" else str(image.format)
            return EXTENSIONS[name], image.width, image.height
    except Exception as error:  # PIL raises many kinds on hostile bytes
        raise DataError(f"{where}: not a JPEG, PNG or WEBP image: {error}") from None
