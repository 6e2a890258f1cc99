"""The index beside the shards, and random access to samples through it, in a local folder or in an object store.

`index.json` is the header: format version, digest, and the shards with sizes and hashes; its `shardlist` is what
`wids` expects, so `wids.ShardListDataset(".../index.json")` opens the same file. `index.jsonl` has one line per
sample: where its bytes are. Nothing scans a tar at run time, and nothing here holds a lock while it reads.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord
from samtrain.data.cache import DiskCache
from samtrain.data.options import RemoteOptions
from samtrain.data.reading import Extent, LocalShards, RemoteShards, Request, Shards
from samtrain.data.reading import ShardError as ShardError  # what reading an index raises, to be had with it
from samtrain.data.storage import LOAD_RETRY_SECONDS, Location, Store, Url, is_object_name, parse_location

INDEX_FILE = "index.json"
SAMPLES_FILE = "index.jsonl"
VERSION = 1
MAX_RECORD_BYTES = 16 * 1024**2  # more is no text anybody wrote, and fills the memory when it is parsed
MAX_IMAGE_BYTES = 256 * 1024**2
# Of a store, whose index nobody here wrote: a million shards, and some millions of samples.
MAX_REMOTE_HEADER_BYTES = 256 * 1024**2
MAX_REMOTE_SAMPLES_BYTES = 4 * 1024**3


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
        folder: Location,
        *,
        digest: str,
        shards: Shards,
        entries: list[SampleEntry],
        broken_shards: dict[int, str],
    ) -> None:
        self.folder = folder
        self.digest = digest
        self.shards = shards.names
        self.shard_sizes = shards.sizes  # bytes, as the index says
        self.entries = entries
        self.broken_shards = broken_shards
        self._reader = shards

    @staticmethod
    def load(
        folder: str | Location, *, tolerate_broken_shards: bool = False, remote: RemoteOptions | None = None
    ) -> "ShardIndex":
        """Read and check the index of `folder`; every shard must be there with its recorded size.

        A store is asked for one listing; one that cannot list (HTTP) has its shards checked when they are first read.

        Args:
            folder: a local folder, or a URL (storage.py says which).
            tolerate_broken_shards: list shards that are not in `broken_shards` instead of refusing the folder: a run
                that goes on need not end for them (see quarantine.py).
            remote: how a store is read.

        Raises:
            DataError: naming the file and what to do.
            ConfigError: a URL that is not allowed, or a cache that cannot be made.
        """
        folder = parse_location(folder)
        place = _RemotePlace(folder, remote or RemoteOptions()) if isinstance(folder, Url) else _LocalPlace(folder)
        name, rebuild = folder / INDEX_FILE, place.rebuild
        try:
            header = json.loads(place.read_header())
            version, shards = header["version"], header["shardlist"]
            samples = place.read_samples(header["samples_sha256"])
            expected = header_of(shards, samples)
            for shard in shards:
                _check_listed(shard, name, rebuild=rebuild, is_remote=place.is_remote)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{name}: cannot be read ({error!r}); {rebuild}") from None
        if version != VERSION:
            raise DataError(f"{name}: version {version}, this samtrain reads {VERSION}; {rebuild}")
        if header.get("digest") != expected["digest"]:
            raise DataError(f"{folder / SAMPLES_FILE}: does not belong to {INDEX_FILE} (digests differ); {rebuild}")
        broken: dict[int, str] = {}
        for number, shard in enumerate(shards):
            try:
                place.check_shard(shard["url"], shard["filesize"], number)
            except ShardError as error:
                if not tolerate_broken_shards:
                    raise
                broken[number] = str(error)
        sizes = [shard["filesize"] for shard in shards]
        entries = _entries(samples, sizes, folder / SAMPLES_FILE, rebuild=rebuild)
        if not entries:
            raise DataError(f"{folder}: the index lists no sample")
        return ShardIndex(
            folder,
            digest=expected["digest"],
            shards=place.open_shards([shard["url"] for shard in shards], sizes, expected["digest"]),
            entries=entries,
            broken_shards=broken,
        )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def is_remote(self) -> bool:
        return self._reader.is_remote

    def read_record(self, i: int) -> SampleRecord:
        """The record of sample `i`.

        Raises:
            DataError: it cannot be parsed, or is not the sample the index says.
        """
        found = self.read_records([i])[0]
        if isinstance(found, DataError):
            raise found
        return found

    def read_records(self, samples: Sequence[int]) -> list[SampleRecord | DataError]:
        """The records of these samples, or what is wrong with each; a store is asked for all of them at once."""
        found: list[SampleRecord | DataError] = []
        requests: list[Request] = []
        for i in samples:
            entry = self.entries[i]
            # A record that is too large is not asked for.
            extents = () if entry.record[1] > MAX_RECORD_BYTES else (entry.record,)
            requests.append((entry.shard, extents, entry.key))
        for i, data in zip(samples, self._reader.read_many(requests)):
            try:
                found.append(self._parse(i, data))
            except DataError as error:
                found.append(error)
        return found

    def read_images(self, i: int, record: SampleRecord, *, verify: bool = True) -> list[bytes]:
        """The encoded images of sample `i`.

        Args:
            verify: check each against the hash in its record; those from a store always are.

        Raises:
            DataError: bytes are missing or not those the record describes.
        """
        entry = self.entries[i]
        _check_image_sizes(entry, record)
        images = self._reader.read(entry.shard, entry.images, key=entry.key)
        if not (verify or self.is_remote):
            return images
        for reference, data in zip(record.images, images, strict=True):
            found = hashlib.sha256(data).hexdigest() if reference.sha256 else ""
            if found != reference.sha256:
                raise DataError(
                    f"{self.folder / self.shards[entry.shard]}: {reference.file}: sha256 is {found[:12]}..., "
                    f"its record says {reference.sha256[:12]}...: damaged or replaced"
                )
        return images

    def prefetch_images(self, samples: Sequence[int]) -> None:
        """Begin to fetch the images of these samples, which `read_images` will be asked for in this order."""
        entries = [self.entries[i] for i in samples]
        self._reader.prefetch([(entry.shard, entry.images, entry.key) for entry in entries if _is_fit(entry)])

    def read_sample(self, i: int) -> tuple[SampleRecord, list[bytes]]:
        """Record and encoded images of sample `i`."""
        record = self.read_record(i)
        return record, self.read_images(i, record)

    def read_members(self, entry: SampleEntry) -> bytes:
        """All of a sample as the tar has it: headers, record, images and extra members."""
        return self._reader.read(entry.shard, [(entry.offset, entry.size)], key=entry.key)[0]

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._reader.close()

    def _parse(self, i: int, data: list[bytes] | ShardError) -> SampleRecord:
        entry = self.entries[i]
        where = f"{self.folder / self.shards[entry.shard]}: {entry.key}"
        check_record_size(entry.record, where=where)
        if isinstance(data, ShardError):
            raise data
        record = SampleRecord.from_json(data[0], where=where)
        text_bytes = len(record.instruction.encode()) + len(record.output.encode())
        expected = (entry.key, entry.num_images, entry.text_bytes)
        if (record.key, len(record.images), text_bytes) != expected:
            raise DataError(
                f"{where}: the record there is {record.key!r} with {len(record.images)} images and {text_bytes} bytes "
                f"of text, the index expects {entry.num_images} and {entry.text_bytes}; "
                f"`samtrain data index` makes a new one"
            )
        return record


def check_record_size(extent: Extent, *, where: str) -> None:
    """Refuse a record that is too large to be parsed, before it is read.

    Raises:
        DataError: naming both sizes.
    """
    if extent[1] > MAX_RECORD_BYTES:
        raise DataError(f"{where}: its record has {extent[1]} bytes, more than {MAX_RECORD_BYTES}; leave it out")


class _LocalPlace:
    """Where a set is: in a folder."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rebuild = f"`samtrain data index {folder}` makes it anew from the shards"

    def read_header(self) -> bytes:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder of shards")
        if not (self.folder / INDEX_FILE).exists():
            raise DataError(f"{self.folder / INDEX_FILE}: missing; {self.rebuild}")
        return (self.folder / INDEX_FILE).read_bytes()

    def read_samples(self, sha256: str) -> bytes:
        return (self.folder / SAMPLES_FILE).read_bytes()

    def check_shard(self, name: str, expected: int, number: int) -> None:
        """Raises ShardError where it is not as the index says."""
        path = self.folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise ShardError(f"{path}: this shard is missing; copy it here, or {self.rebuild}", shard=number) from None
        except OSError as error:
            raise ShardError(f"{path}: cannot be looked at: {error}", shard=number) from None
        if size != expected:
            raise ShardError(
                f"{path}: {size} bytes, the index says {expected}; copy it again, or {self.rebuild}", shard=number
            )

    def open_shards(self, names: list[str], sizes: list[int], digest: str) -> Shards:
        return LocalShards(self.folder, names, sizes)


class _RemotePlace:
    """Where a set is: in a store."""

    is_remote = True

    def __init__(self, folder: Url, options: RemoteOptions) -> None:
        self.folder = folder
        self.rebuild = "copy the set there again, its index last"
        self._cache = DiskCache(options.cache_dir, max_bytes=options.cache_bytes)
        self._store = Store(folder, retry_seconds=options.retry_seconds)
        self._first = self._store.with_patience(LOAD_RETRY_SECONDS)  # somebody waits for a run to begin

    def read_header(self) -> bytes:
        """Always from the store: this is how a set that changed is noticed."""
        try:
            return self._first.read_whole(INDEX_FILE, max_bytes=MAX_REMOTE_HEADER_BYTES)
        except DataError as error:
            raise DataError(f"{error}; {self.folder} should be a folder of shards with their {INDEX_FILE}") from None

    def read_samples(self, sha256: str) -> bytes:
        """Once for all processes of a node."""
        if not isinstance(sha256, str):
            raise TypeError(f"samples_sha256 is {sha256!r}")

        def load() -> bytes:
            data = self._first.read_whole(SAMPLES_FILE, max_bytes=MAX_REMOTE_SAMPLES_BYTES)
            if hashlib.sha256(data).hexdigest() != sha256:  # never to be kept under that name
                raise DataError(
                    f"{self.folder / SAMPLES_FILE}: does not belong to {INDEX_FILE} (digests differ); {self.rebuild}"
                )
            return data

        return self._cache.fetch(f"{self.folder / SAMPLES_FILE} {sha256}", load)

    def check_shard(self, name: str, expected: int, number: int) -> None:
        """As of `_LocalPlace`, where the store can list."""
        listing = self._first.listing()
        if listing is None:
            return
        url = self.folder / name
        if name not in listing:
            raise ShardError(f"{url}: this shard is missing; {self.rebuild}", shard=number)
        if listing[name] != expected:
            raise ShardError(f"{url}: {listing[name]} bytes, the index says {expected}; {self.rebuild}", shard=number)

    def open_shards(self, names: list[str], sizes: list[int], digest: str) -> Shards:
        return RemoteShards(self._store, names, sizes, cache=self._cache, digest=digest)


def _check_listed(shard: Any, name: Location, *, rebuild: str, is_remote: bool) -> None:
    """Refuse a shard of index.json that names something else than a file beside it.

    Raises:
        DataError: naming it.
    """
    url, size = shard["url"], shard["filesize"]
    is_name = isinstance(url, str) and Path(url).name == url and url not in ("", "..")
    if not (is_object_name(url) if is_remote else is_name):
        raise DataError(f"{name}: shard {url!r} is not a file name; {rebuild}")
    if type(size) is not int or size < 0:
        raise DataError(f"{name}: the size of shard {url!r} is {size!r}; {rebuild}")


def _entries(samples: bytes, sizes: list[int], name: Location, *, rebuild: str) -> list[SampleEntry]:
    """The lines of index.jsonl, each within its shard.

    Raises:
        DataError: naming the file and the sample.
    """
    try:
        entries = [SampleEntry.from_json(line) for line in samples.decode().split("\n") if line]
        for entry in entries:
            fits = 0 <= entry.shard < len(sizes) and all(
                type(offset) is type(size) is int and offset >= 0 and size >= 0 and offset + size <= sizes[entry.shard]
                for offset, size in (entry.record, *entry.images)
            )
            if not fits or not isinstance(entry.key, str):
                raise DataError(f"{name}: {entry.key}: points outside its shard; {rebuild}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{name}: not an index of samples ({error!r}); {rebuild}") from None
    return entries


def _is_fit(entry: SampleEntry) -> bool:
    return all(size <= MAX_IMAGE_BYTES for _, size in entry.images)


def _check_image_sizes(entry: SampleEntry, record: SampleRecord) -> None:
    for reference, (_, size) in zip(record.images, entry.images, strict=True):
        if size > MAX_IMAGE_BYTES:
            raise DataError(f"{reference.file}: {size} bytes, more than {MAX_IMAGE_BYTES} for an image")
