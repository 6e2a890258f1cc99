"""Bytes out of shards: in a local folder, or in a store through the disk cache. Both are safe from any thread.

A shard is asked for the extents of one sample, which lie one after another, so a store is asked once. A remote read is
mostly waiting: `read_many` waits for many samples at once, and `prefetch` begins what `read` will ask for.
"""

import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.data.cache import DiskCache
from samtrain.data.storage import Store

MAX_OPEN_SHARDS = 256  # descriptors kept; shards beyond are opened for each read
NUM_CONNECTIONS = 16
MAX_AHEAD_BYTES = 256 * 1024**2  # fetched and not yet asked for
_KEPT_PLANS = 3  # steps that are begun before an earlier one is finished, and more
_MAX_GAP = 64 * 1024  # between extents; reading over it costs less than another request
_MAX_RUN = 256 * 1024**2  # of one request; a single extent may be larger

Extent = tuple[int, int]  # (offset, size) of a member's bytes in its tar
Request = tuple[int, Sequence[Extent], str]  # shard, extents, the sample's key for messages
_Run = tuple[int, int, int]  # shard, start, stop


class ShardError(DataError):
    """A shard as a whole is missing, cut off, replaced or unreadable. shard: its number."""

    def __init__(self, message: str, *, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class LocalShards:
    """Shards in a folder, read in place."""

    is_remote = False

    def __init__(self, folder: Path, names: list[str], sizes: list[int]) -> None:
        self.folder = folder
        self.names = names
        self.sizes = sizes
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._open)

    def read(self, shard: int, extents: Sequence[Extent], *, key: str) -> list[bytes]:
        """The bytes of each extent.

        Raises:
            ShardError: naming the shard and `key`.
        """
        path = self.folder / self.names[shard]
        descriptor, is_kept = self._descriptor(shard)
        try:
            return [self._read(descriptor, path, shard, extent, key) for extent in extents]
        finally:
            if not is_kept:
                os.close(descriptor)

    def read_many(self, requests: Sequence[Request]) -> list[list[bytes] | ShardError]:
        """As `read`, for each; errors take the place of what they concern."""
        return [_caught(self, request) for request in requests]

    def prefetch(self, requests: Sequence[Request]) -> None:
        """Nothing: the operating system reads ahead."""

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        with self._lock:
            _close_all(self._open)

    def _read(self, descriptor: int, path: Path, shard: int, extent: Extent, key: str) -> bytes:
        offset, size = extent
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise ShardError(f"{path}: {key}: cannot be read: {error}", shard=shard) from None
        if len(data) != size:
            raise ShardError(
                f"{path}: {key}: {len(data)} of {size} bytes at {offset}: the shard was cut off", shard=shard
            )
        return data

    def _descriptor(self, shard: int) -> tuple[int, bool]:
        """A descriptor of the shard, and whether it stays open (opening costs a round trip on a cluster's disk)."""
        with self._lock:
            if shard in self._open:
                return self._open[shard], True
            path = self.folder / self.names[shard]
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{path}: cannot be opened any more: {error}", shard=shard) from None
            size, expected = os.fstat(descriptor).st_size, self.sizes[shard]
            if size != expected:
                os.close(descriptor)
                what = "the shard was cut off" if size < expected else "the shard was replaced"
                raise ShardError(f"{path}: {size} bytes, the index says {expected}: {what}", shard=shard)
            is_kept = len(self._open) < MAX_OPEN_SHARDS
            if is_kept:
                self._open[shard] = descriptor
            return descriptor, is_kept


class RemoteShards:
    """Shards in a store. Ranges go through the cache; of the processes of a node that want one, one fetches it.

    digest: of the set, so that the cache never mixes it with what was at this URL before.
    """

    is_remote = True

    def __init__(self, store: Store, names: list[str], sizes: list[int], *, cache: DiskCache, digest: str) -> None:
        self.store = store
        self.names = names
        self.sizes = sizes
        self._cache = cache
        self._digest = digest
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._plan = 0  # number of the last `prefetch`
        self._planned: deque[tuple[int, _Run]] = deque()
        self._ahead: dict[_Run, tuple[int, Future[bytes]]] = {}
        self._ahead_bytes = 0

    def read(self, shard: int, extents: Sequence[Extent], *, key: str) -> list[bytes]:
        """As `LocalShards.read`."""
        found: dict[Extent, bytes] = {}
        for run, members in _runs(shard, extents):
            future = self._take(run)
            try:
                data = self._fetch(run) if future is None else future.result()
            except ShardError as error:
                raise ShardError(f"{key}: {error}", shard=shard) from None
            for offset, size in members:
                found[offset, size] = data[offset - run[1] : offset - run[1] + size]
        return [found[extent] for extent in extents]

    def read_many(self, requests: Sequence[Request]) -> list[list[bytes] | ShardError]:
        """As `LocalShards.read_many`; waits for all at once."""
        # The processes of a node want the same records: each begins elsewhere, and finds what others fetched.
        order = random.sample(range(len(requests)), len(requests))
        pool = self._threads()
        futures = {i: pool.submit(_caught, self, requests[i]) for i in order}
        return [futures[i].result() for i in range(len(requests))]

    def prefetch(self, requests: Sequence[Request]) -> None:
        """Fetch what `read` will be asked for next, in this order, some way ahead.

        What was planned some calls ago and not asked for since is dropped: that step was not finished.
        """
        with self._lock:
            self._plan += 1
            self._drop(self._plan - _KEPT_PLANS)
            self._planned.extend(
                (self._plan, run) for shard, extents, _ in requests for run, _ in _runs(shard, extents)
            )
            self._advance()

    def close(self) -> None:
        """End the threads; a later read starts them again."""
        with self._lock:
            self._drop(self._plan)
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, run: _Run) -> "Future[bytes] | None":
        """What was begun for `run`, if it was."""
        with self._lock:
            begun = self._ahead.pop(run, None)
            if begun is not None:
                self._ahead_bytes -= run[2] - run[1]
            else:  # its turn may have come before we were there
                self._planned = deque(planned for planned in self._planned if planned[1] != run)
            self._advance()
        return None if begun is None else begun[1]

    def _drop(self, plan: int) -> None:
        """Forget what was planned by call `plan` and before. The lock is held."""
        self._planned = deque(planned for planned in self._planned if planned[0] > plan)
        for run in [run for run, (number, _) in self._ahead.items() if number <= plan]:
            self._ahead.pop(run)[1].cancel()
            self._ahead_bytes -= run[2] - run[1]

    def _advance(self) -> None:
        """Begin what is planned, as far as memory allows. The lock is held."""
        while self._planned and (not self._ahead or self._ahead_bytes < MAX_AHEAD_BYTES):
            plan, run = self._planned.popleft()
            if run not in self._ahead:
                self._ahead[run] = plan, self._threads_locked().submit(self._fetch, run)
                self._ahead_bytes += run[2] - run[1]

    def _fetch(self, run: _Run) -> bytes:
        shard, start, stop = run
        name, size = self.names[shard], self.sizes[shard]
        key = f"{self.store.folder / name} {self._digest} {start}-{stop}"
        try:
            return self._cache.fetch(key, lambda: self.store.read(name, start, stop, object_size=size))
        except DataError as error:
            raise ShardError(str(error), shard=shard) from None

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            return self._threads_locked()

    def _threads_locked(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="samtrain-store")
        return self._pool


Shards = LocalShards | RemoteShards


def _caught(shards: Shards, request: Request) -> list[bytes] | ShardError:
    shard, extents, key = request
    try:
        return shards.read(shard, extents, key=key)
    except ShardError as error:
        return error


def _runs(shard: int, extents: Sequence[Extent]) -> list[tuple[_Run, list[Extent]]]:
    """Stretches of the shard that hold the extents, and which; those that nearly touch are one."""
    runs: list[tuple[_Run, list[Extent]]] = []
    for offset, size in sorted(extents):
        stop = offset + size
        if runs:
            (_, first, last), members = runs[-1]
            if offset - last <= _MAX_GAP and max(stop, last) - first <= _MAX_RUN:
                runs[-1] = (shard, first, max(stop, last)), [*members, (offset, size)]
                continue
        runs.append(((shard, offset, stop), [(offset, size)]))
    return runs


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        _, descriptor = descriptors.popitem()
        os.close(descriptor)
