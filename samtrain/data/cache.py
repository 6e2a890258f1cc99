"""A bounded disk cache of byte strings, shared by all processes and threads of a node.

Every entry is one file: a checksum, then the bytes. It is written beside and renamed, so a process that is killed
leaves no torn entry, and what a power cut or a bad disk damages is a miss. The least recently used entries (by file
times, which every hit renews) go before a new one would pass the bound, which counts what the disk counts: whole blocks
and leftovers of killed processes too. A cache that cannot be written (a full disk) costs time and nothing else.

Not `diskcache`: it unpickles what it finds, passed its bound by 6 % with four writers and left files behind that it no
longer counted when they were killed (version 5.6.3).
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from samtrain.core.errors import ConfigError
from samtrain.core.log import logger

_BLOCK = 4096
_NAME_BYTES = 128  # a name's share of its folder
_NUM_FOLDERS = 16
_NUM_LOCKS = 1024
_FIXED_BYTES = 64 * 1024  # the count, and the locks' folder when it is full
_KEEP = 0.9  # of the bound, when room is made: looking at all files is for many writes
_PAUSE_SECONDS = 60  # between attempts to write where the disk refused


def default_folder() -> Path:
    """The user's cache folder (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samtrain" / "shards"


class DiskCache:
    """key -> bytes. Several caches may use one folder at once; each keeps its own bound.

    folder: None: samtrain/shards in the user's cache folder.
    max_bytes: None: half of what the disk has free besides the cache, so that checkpoints find room.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None = None, *, max_bytes: int | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self._entries, self._locks = self.folder / "entries", self.folder / "locks"
        self._usage = self.folder / "usage"  # bytes taken by all entries, at least; read and written under its lock
        self._numbers = itertools.count()
        self._paused_until = 0.0
        try:
            self._make_folders()
        except OSError as error:
            raise ConfigError(
                f"data.remote.cache_dir: {self.folder} cannot be written ({error.strerror}); name a folder on a "
                f"local disk"
            ) from None
        self.max_bytes = (self._free_bytes() + self._counted_bytes()) // 2 if max_bytes is None else max_bytes
        self._max_entries_bytes = self.max_bytes - _FIXED_BYTES

    def get(self, key: str) -> bytes | None:
        """The bytes under `key`, checked; None where they are not there whole."""
        path = self._path(key)
        try:
            with open(path, "rb") as stream:
                content = stream.read()
                os.utime(stream.fileno())
        except OSError:
            return None
        data = content[4:]
        if content[:4] != _checksum(key, data):
            path.unlink(missing_ok=True)
            return None
        return data

    def put(self, key: str, data: bytes) -> bool:
        """Keep `data`, making room first; whether it is kept: not if it is too large, or the disk refuses."""
        needed = _on_disk(len(data) + 4)
        if needed > self._max_entries_bytes // 2 or time.monotonic() < self._paused_until:
            return False
        path = self._path(key)
        temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{next(self._numbers)}")
        try:
            try:
                self._reserve(needed, temporary, len(data) + 4)
                with open(temporary, "r+b") as stream:
                    stream.write(_checksum(key, data))
                    stream.write(data)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            if not isinstance(error, FileNotFoundError):  # another process made room with it, or deleted the cache
                logger.warning("%s: cannot be written, data is fetched again instead: %s", self.folder, error)
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
            else:
                with contextlib.suppress(OSError):
                    self._make_folders()
            return False
        return True

    def fetch(self, key: str, load: Callable[[], bytes]) -> bytes:
        """The bytes under `key`, or else those of `load`; of all that ask at once, one calls it."""
        data = self.get(key)
        if data is not None:
            return data
        number = int(self._path(key).name[:8], 16) % _NUM_LOCKS
        with _locked(self._locks / f"{number:03x}"):
            data = self.get(key)
            if data is None:
                data = load()
                self.put(key, data)
        return data

    def describe(self) -> str:
        """How large it may grow, in words; what does not fit on the disk is said."""
        used, free = self._counted_bytes(), self._free_bytes()
        said = f"{self.folder}: {_gib(self.max_bytes)} at most, {_gib(used)} used, {_gib(free)} free on the disk"
        if self.max_bytes - used > free:
            said += ": data.remote.cache_bytes is more than there is; caching ends when the disk is full"
        return said

    def used_bytes(self) -> int:
        """What the entries take on disk now; looks at all of them."""
        return sum(size for _, size, _ in self._files()) + self._folder_bytes()

    def _counted_bytes(self) -> int:
        with contextlib.suppress(OSError):
            return int.from_bytes(self._usage.read_bytes(), "little")
        return 0

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _make_folders(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._locks.mkdir(exist_ok=True)
        for number in range(_NUM_FOLDERS):
            (self._entries / f"{number:x}").mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._entries / name[-1] / name

    def _reserve(self, needed: int, path: Path, size: int) -> None:
        """Make `path` with `size` bytes that take no room yet, counted before they do; old entries make room.

        Whoever is killed afterwards leaves too high a count, which the next look at the files puts right.
        """
        descriptor = os.open(self._usage, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            counted = os.pread(descriptor, 8, 0)
            used = int.from_bytes(counted, "little") if len(counted) == 8 else self._max_entries_bytes
            if used + needed > self._max_entries_bytes:
                used = self._make_room(needed)
            os.pwrite(descriptor, (used + needed).to_bytes(8, "little"), 0)
            with open(path, "xb") as stream:
                stream.truncate(size)
        finally:
            os.close(descriptor)

    def _make_room(self, needed: int) -> int:
        """Delete the least recently used until there is room to spare; returns what is left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files) + self._folder_bytes()
        for _, size, path in files:
            if used + needed <= self._max_entries_bytes * _KEEP:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(last used, bytes on disk, path) of all files: entries, and what is being written or was left."""
        for number in range(_NUM_FOLDERS):
            with contextlib.suppress(FileNotFoundError), os.scandir(self._entries / f"{number:x}") as found:
                for one in found:
                    with contextlib.suppress(FileNotFoundError):
                        status = one.stat(follow_symlinks=False)
                        # What is being written has its size before it has its blocks.
                        yield status.st_mtime, max(status.st_blocks * 512, _on_disk(status.st_size)), one.path

    def _folder_bytes(self) -> int:
        folders = [self._entries / f"{number:x}" for number in range(_NUM_FOLDERS)]
        return sum(folder.stat().st_blocks * 512 for folder in folders if folder.exists())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK + _NAME_BYTES


def _checksum(key: str, data: bytes) -> bytes:
    return zlib.crc32(data, zlib.crc32(key.encode())).to_bytes(4, "little")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file against threads and processes; it goes with its holder. None where none can be had."""
    descriptor = -1
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)
