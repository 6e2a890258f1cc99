"""The index beside the shards, and random access to samples through it.

`index.json` is the header: format version, digest, and the shards with sizes and hashes; its `shardlist` is what
`wids` expects, so `wids.ShardListDataset(".../index.json")` opens the same file. `index.jsonl` has one line per
sample: where its bytes are. Nothing scans a tar at run time, and nothing here holds a lock while it reads.
"""

import hashlib
import json
import os
import threading
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord

INDEX_FILE = "index.json"
SAMPLES_FILE = "index.jsonl"
VERSION = 1
MAX_OPEN_SHARDS = 256  # descriptors kept; shards beyond are opened for each read
MAX_RECORD_BYTES = 16 * 1024**2  # more is no text anybody wrote, and fills the memory when it is parsed
MAX_IMAGE_BYTES = 256 * 1024**2

Extent = tuple[int, int]  # (offset, size) of a member's bytes in its tar


class ShardError(DataError):
    """A shard as a whole is missing, cut off, replaced or unreadable. shard: its number."""

    def __init__(self, message: str, *, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """Where a sample is: its shard's number, its bytes with tar headers, and the extents of record and images.

    text_bytes: UTF-8 bytes of instruction and output; no tokenizer makes more tokens of them.
    """

    key: str
    task: str
    shard: int
    offset: int
    size: int
    text_bytes: int
    record: Extent
    images: tuple[Extent, ...]

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def num_tokens_estimate(self) -> int:
        """Text tokens at about 4 bytes each, as English has; without image spans, which depend on the model."""
        return -(-self.text_bytes // 4)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @staticmethod
    def from_json(line: str) -> "SampleEntry":
        values = json.loads(line)
        values["record"] = tuple(values["record"])
        values["images"] = tuple(tuple(extent) for extent in values["images"])
        return SampleEntry(**values)


def header_of(shards: list[dict[str, Any]], samples: bytes) -> dict[str, Any]:
    """The content of index.json for `shards` (url, nsamples, filesize, sha256) and the bytes of index.jsonl."""
    samples_sha256 = hashlib.sha256(samples).hexdigest()
    identity = json.dumps([VERSION, shards, samples_sha256], sort_keys=True)
    return {
        "version": VERSION,
        "wids_version": 1,
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "num_samples": sum(shard["nsamples"] for shard in shards),
        "samples_file": SAMPLES_FILE,
        "samples_sha256": samples_sha256,
        "shardlist": shards,
    }


class ShardIndex:
    """The samples of a folder: `index.entries[i]`, `len(index)`, `index.digest`; reads are safe from any thread.

    broken_shards: number -> what is wrong, of the shards that were not as the index says when it was loaded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        digest: str,
        shards: list[str],
        shard_sizes: list[int],
        entries: list[SampleEntry],
        broken_shards: dict[int, str],
    ) -> None:
        self.folder = folder
        self.digest = digest
        self.shards = shards
        self.shard_sizes = shard_sizes  # bytes, as the index says
        self.entries = entries
        self.broken_shards = broken_shards
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._open)

    @staticmethod
    def load(folder: str | Path, *, tolerate_broken_shards: bool = False) -> "ShardIndex":
        """Read and check the index of `folder`; every shard must be there with its recorded size.

        Args:
            tolerate_broken_shards: list shards that are not in `broken_shards` instead of refusing the folder: a run
                that goes on need not end for them (see quarantine.py).

        Raises:
            DataError: naming the file and what to do.
        """
        folder = Path(folder)
        rebuild = f"`samtrain data index {folder}` makes it anew from the shards"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of shards")
        if not (folder / INDEX_FILE).exists():
            raise DataError(f"{folder / INDEX_FILE}: missing; {rebuild}")
        try:
            header = json.loads((folder / INDEX_FILE).read_bytes())
            version, shards = header["version"], header["shardlist"]
            samples = (folder / SAMPLES_FILE).read_bytes()
            expected = header_of(shards, samples)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / INDEX_FILE}: cannot be read ({error!r}); {rebuild}") from None
        if version != VERSION:
            raise DataError(f"{folder / INDEX_FILE}: version {version}, this samtrain reads {VERSION}; {rebuild}")
        if header.get("digest") != expected["digest"]:
            raise DataError(f"{folder / SAMPLES_FILE}: does not belong to {INDEX_FILE} (digests differ); {rebuild}")
        broken: dict[int, str] = {}
        for number, shard in enumerate(shards):
            try:
                _check_shard(folder, shard, number, rebuild=rebuild)
            except ShardError as error:
                if not tolerate_broken_shards:
                    raise
                broken[number] = str(error)
        sizes = [shard["filesize"] for shard in shards]
        try:
            entries = [SampleEntry.from_json(line) for line in samples.decode().split("\n") if line]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / SAMPLES_FILE}: not an index of samples ({error!r}); {rebuild}") from None
        for entry in entries:
            fits = 0 <= entry.shard < len(sizes) and all(
                offset >= 0 and size >= 0 and offset + size <= sizes[entry.shard]
                for offset, size in (entry.record, *entry.images)
            )
            if not fits:
                raise DataError(f"{folder / SAMPLES_FILE}: {entry.key}: points outside its shard; {rebuild}")
        if not entries:
            raise DataError(f"{folder}: the index lists no sample")
        names = [shard["url"] for shard in shards]
        return ShardIndex(
            folder,
            digest=expected["digest"],
            shards=names,
            shard_sizes=sizes,
            entries=entries,
            broken_shards=broken,
        )

    def __len__(self) -> int:
        return len(self.entries)

    def read_record(self, i: int) -> SampleRecord:
        """The record of sample `i`.

        Raises:
            DataError: it cannot be parsed, or is not the sample the index says.
        """
        entry = self.entries[i]
        where = f"{self.folder / self.shards[entry.shard]}: {entry.key}"
        check_record_size(entry.record, where=where)
        record = SampleRecord.from_json(self._read(entry, entry.record), where=where)
        if record.key != entry.key or len(record.images) != entry.num_images:
            raise DataError(
                f"{where}: the record there is {record.key!r} with {len(record.images)} images, the index expects "
                f"{entry.num_images}; `samtrain data index {self.folder}` makes a new one"
            )
        return record

    def read_images(self, i: int, record: SampleRecord, *, verify: bool = True) -> list[bytes]:
        """The encoded images of sample `i`, each checked against the hash in its record unless `verify` is False.

        Raises:
            DataError: bytes are missing or not those the record describes.
        """
        entry = self.entries[i]
        images = []
        for reference, extent in zip(record.images, entry.images, strict=True):
            if extent[1] > MAX_IMAGE_BYTES:
                raise DataError(f"{reference.file}: {extent[1]} bytes, more than {MAX_IMAGE_BYTES} for an image")
            data = self._read(entry, extent)
            found = hashlib.sha256(data).hexdigest() if verify and reference.sha256 else reference.sha256
            if found != reference.sha256:
                raise DataError(
                    f"{self.folder / self.shards[entry.shard]}: {reference.file}: sha256 is {found[:12]}..., "
                    f"its record says {reference.sha256[:12]}...: damaged or replaced"
                )
            images.append(data)
        return images

    def read_sample(self, i: int) -> tuple[SampleRecord, list[bytes]]:
        """Record and encoded images of sample `i`."""
        record = self.read_record(i)
        return record, self.read_images(i, record)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        with self._lock:
            _close_all(self._open)

    def _read(self, entry: SampleEntry, extent: Extent) -> bytes:
        offset, size = extent
        descriptor, is_kept = self._descriptor(entry.shard)
        path = self.folder / self.shards[entry.shard]
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise ShardError(f"{path}: {entry.key}: cannot be read: {error}", shard=entry.shard) from None
        finally:
            if not is_kept:
                os.close(descriptor)
        if len(data) != size:
            raise ShardError(
                f"{path}: {entry.key}: {len(data)} of {size} bytes at {offset}: the shard was cut off",
                shard=entry.shard,
            )
        return data

    def _descriptor(self, shard: int) -> tuple[int, bool]:
        """A descriptor of the shard, and whether it stays open (opening costs a round trip on a cluster's disk)."""
        path = self.folder / self.shards[shard]
        with self._lock:
            if shard in self._open:
                return self._open[shard], True
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{path}: cannot be opened any more: {error}", shard=shard) from None
            size, expected = os.fstat(descriptor).st_size, self.shard_sizes[shard]
            if size != expected:
                os.close(descriptor)
                what = "the shard was cut off" if size < expected else "the shard was replaced"
                raise ShardError(f"{path}: {size} bytes, the index says {expected}: {what}", shard=shard)
            is_kept = len(self._open) < MAX_OPEN_SHARDS
            if is_kept:
                self._open[shard] = descriptor
            return descriptor, is_kept


def check_record_size(extent: Extent, *, where: str) -> None:
    """Refuse a record that is too large to be parsed, before it is read.

    Raises:
        DataError: naming both sizes.
    """
    if extent[1] > MAX_RECORD_BYTES:
        raise DataError(f"{where}: its record has {extent[1]} bytes, more than {MAX_RECORD_BYTES}; leave it out")


def _check_shard(folder: Path, shard: dict[str, Any], number: int, *, rebuild: str) -> None:
    """Refuse a shard that is not there as the index says."""
    name, expected = shard["url"], shard["filesize"]
    if not isinstance(name, str) or Path(name).name != name:
        raise DataError(f"{folder / INDEX_FILE}: shard {name!r} is not a file name; {rebuild}")
    if not isinstance(expected, int):
        raise DataError(f"{folder / INDEX_FILE}: the size of shard {name!r} is {expected!r}; {rebuild}")
    path = folder / name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path}: this shard is missing; copy it here, or {rebuild}", shard=number) from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be looked at: {error}", shard=number) from None
    if size != expected:
        raise ShardError(f"{path}: {size} bytes, the index says {expected}; copy it again, or {rebuild}", shard=number)


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        _, descriptor = descriptors.popitem()
        os.close(descriptor)
