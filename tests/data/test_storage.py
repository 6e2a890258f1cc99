"""Sets in an object store: read over real HTTP from a server that fails for real, and over the S3 protocol."""

import contextlib
import fcntl
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from samtrain.core.errors import ConfigError, DataError
from samtrain.data import cache, reading, storage
from samtrain.data import index as index_module
from samtrain.data.index import INDEX_FILE, SAMPLES_FILE, ShardError, ShardIndex, header_of
from samtrain.data.loader import TrainLoader, evaluation_steps
from samtrain.data.mixture import MixedIndex, load_split
from samtrain.data.options import RemoteOptions, SourceOptions
from samtrain.data.preflight import largest_sample
from samtrain.data.shards import build_index
from samtrain.data.storage import Url, parse_location

CACHE = 50 * 2**20


@dataclass(frozen=True)
class Request:
    """number: how often this very path and range was asked for before."""

    path: str
    start: int
    stop: int
    number: int


@dataclass
class Fault:
    """What to do instead of answering.

    status: answer with it (and `headers`). send: so many bytes of the body, then close; `reset`: by a reset. wait:
    seconds before the answer. body: other bytes, with right headers. headers: over the right ones; None leaves one out.
    """

    status: int = 206
    headers: dict[str, str | None] = field(default_factory=dict)
    send: int | None = None
    reset: bool = False
    wait: float = 0.0
    body: bytes | None = None


class RangeServer:
    """Serves `folder` on a free port; `requests` are those that came; `fault(request)` may return a Fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            server_of = owner

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def note(self, path: str, start: int, stop: int) -> Request:
        with self.lock:
            number = sum((r.path, r.start, r.stop) == (path, start, stop) for r in self.requests)
            request = Request(path, start, stop, number)
            self.requests.append(request)
            return request

    def of_shards(self) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(".tar")]


class _Handler(BaseHTTPRequestHandler):
    server_of: RangeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner = self.server_of
        path = owner.folder / self.path.lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, -1)
        fault = owner.fault(owner.note(self.path, start, stop)) or Fault()
        time.sleep(fault.wait)
        if not path.is_file():
            fault = Fault(status=404)
        if fault.status != 206:
            self._answer(fault.status, {"Content-Length": "0"} | fault.headers, b"")
            return
        whole = path.read_bytes()
        if start >= len(whole):
            self._answer(416, {"Content-Range": f"bytes */{len(whole)}", "Content-Length": "0"}, b"")
            return
        body = whole[start : min(stop, len(whole))]
        headers: dict[str, str | None] = {
            "Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(whole)}",
            "Content-Length": str(len(body)),
            "ETag": f'"{zlib.crc32(whole):08x}"',
        }
        if fault.body is not None:
            body = fault.body
        self._answer(206, headers | fault.headers, body if fault.send is None else body[: fault.send])
        if fault.send is not None:
            self.close_connection = True
            if fault.reset:  # nothing of the connection is left in order: the peer gets RST
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def do_HEAD(self) -> None:
        raise AssertionError("nobody needs HEAD")

    def _answer(self, status: int, headers: dict[str, str | None], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):
            super().finish()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def serve():
    servers = []

    def start(folder):
        servers.append(RangeServer(Path(folder)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(fifty, serve):
    """`fifty` at server.url/fifty."""
    return serve(fifty.folder.parent)


@pytest.fixture
def remote(tmp_path):
    return RemoteOptions(cache_dir=str(tmp_path / "cache"), cache_bytes=CACHE, retry_seconds=20.0)


@pytest.fixture
def load(server, remote, request):
    """load(retry_seconds=...) -> the index of `fifty` over HTTP, closed afterwards."""
    opened = []

    def open_it(name="fifty", *, tolerate_broken_shards=False, **changes):
        options = remote.model_copy(update=changes)
        index = ShardIndex.load(f"{server.url}/{name}", remote=options, tolerate_broken_shards=tolerate_broken_shards)
        opened.append(index)
        return index

    yield open_it
    for index in opened:
        index.close()


@pytest.fixture(autouse=True)
def waits_are_short(monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(storage, "_LONGEST_WAIT", 0.1)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def everything(index):
    records = index.read_records(range(len(index)))
    return [(record, index.read_images(i, record)) for i, record in enumerate(records)]


def on(suffix, fault, *, times=10**9):
    """The fault at the first `times` requests of each range of files that end so."""
    return lambda request: fault if request.path.endswith(suffix) and request.number < times else None


# What is read.


def test_a_set_over_http_is_the_set_in_the_folder(fifty, load):
    index = load()
    assert index.is_remote and not fifty.is_remote
    assert (index.digest, index.shards, index.shard_sizes) == (fifty.digest, fifty.shards, fifty.shard_sizes)
    assert index.entries == fifty.entries and index.folder.name == "fifty"
    assert everything(index) == everything(fifty)
    assert index.read_sample(7) == fifty.read_sample(7)


def test_all_images_of_a_sample_are_one_request_and_nothing_is_asked_for_twice(fifty, load, server):
    index = load()
    everything(index)
    asked = server.of_shards()
    assert len(asked) == 2 * len(fifty)  # a record, and all images
    assert max(request.number for request in asked) == 0
    assert all(request.start < request.stop for request in asked)
    everything(index)
    everything(load())  # another index, the same cache
    assert len(server.of_shards()) == len(asked)


def test_extents_far_apart_are_not_read_over():
    near, far = (0, 100), (100 + reading._MAX_GAP, 50)
    assert reading._runs(3, [near, far]) == [((3, 0, 150 + reading._MAX_GAP), [near, far])]
    far = (101 + reading._MAX_GAP, 50)
    assert [run for run, _ in reading._runs(3, [far, near])] == [(3, 0, 100), (3, far[0], far[0] + 50)]
    assert reading._runs(0, []) == []


def test_the_records_of_a_step_are_asked_for_at_once(load, server, monkeypatch):
    monkeypatch.setattr(cache, "_NUM_LOCKS", 16**8)  # of 1024, two of these keys often share one
    index = load()
    together = threading.Event()
    waiting: set[Request] = set()

    def fault(request):
        if request.path.endswith(".tar"):
            waiting.add(request)
            if len(waiting) == reading.NUM_CONNECTIONS:
                together.set()
            assert together.wait(timeout=60)  # answers nobody until all are there

    server.fault = fault
    records = index.read_records(range(2 * reading.NUM_CONNECTIONS))
    assert [record.key for record in records] == [entry.key for entry in index.entries[: len(records)]]
    together.clear()
    waiting.clear()
    index.prefetch_images(range(reading.NUM_CONNECTIONS))
    for i in range(reading.NUM_CONNECTIONS):  # one after another, and all were begun
        index.read_images(i, records[i])


def test_no_more_is_fetched_ahead_than_memory_allows(load, server, monkeypatch):
    index = load()
    records = index.read_records(range(20))
    monkeypatch.setattr(reading, "MAX_AHEAD_BYTES", 1)
    before = len(server.of_shards())
    index.prefetch_images(range(20))
    index.read_images(0, records[0])
    assert len(server.of_shards()) - before <= 2
    for i in range(1, 20):
        index.read_images(i, records[i])
    assert len(server.of_shards()) - before == 20


def test_steps_that_overlap_keep_what_was_begun_and_steps_that_were_dropped_hold_no_memory(load, server):
    index = load()
    records = index.read_records(range(20))
    index.prefetch_images(range(10))
    index.prefetch_images(range(10, 20))  # the next step, begun before the first is finished
    for i in range(20):
        index.read_images(i, records[i])
    assert max(request.number for request in server.of_shards()) == 0
    assert not index._reader._ahead and index._reader._ahead_bytes == 0
    index.prefetch_images(range(20, 30))  # never asked for
    for _ in range(reading._KEPT_PLANS):
        index.prefetch_images([])
    assert not index._reader._ahead and index._reader._ahead_bytes == 0


# Loaders.

LOADER = """
import importlib.util, pickle, sys
from samtrain.data.index import ShardIndex
from samtrain.data.loader import TrainLoader
from samtrain.data.options import DataOptions, RemoteOptions
url, cache, rank, conftest, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location("shared", conftest)
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
remote = RemoteOptions(cache_dir=cache, retry_seconds=20.0)
index = ShardIndex.load(url, remote=remote)
options = DataOptions(path=url, image_size=32, max_tokens=160, max_images=12, num_workers=2, remote=remote)
loader = TrainLoader(index, shared.WordEncoder(), options, global_batch_size=10, seed=7, rank=int(rank), world_size=2)
with loader:
    steps = [next(loader) for _ in range(5)]
index.close()
pickle.dump(steps, open(out, "wb"))
"""


def assert_equal_steps(steps, expected):
    assert [(s.keys, s.cursor, s.skipped) for s in steps] == [(s.keys, s.cursor, s.skipped) for s in expected]
    for step, other in zip(steps, expected):
        for a, b in zip(step.micro_batches, other.micro_batches, strict=True):
            assert a.keys == b.keys
            for name in ("input_ids", "labels", "pixel_values", "cu_seqlens", "qformer_input_ids"):
                assert torch.equal(getattr(a, name), getattr(b, name))


def test_two_processes_train_an_epoch_over_http_bit_by_bit_as_from_the_folder(
    fifty, server, remote, encoder, options, tmp_path
):
    server.fault = lambda request: Fault(status=503) if request.start % 7 == 0 and request.number == 0 else None
    arguments = [sys.executable, "-c", LOADER, f"{server.url}/fifty", remote.cache_dir]
    conftest = str(Path(__file__).with_name("conftest.py"))
    processes = [subprocess.Popen([*arguments, str(rank), conftest, str(tmp_path / f"{rank}.pkl")]) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    for rank in (0, 1):
        loader = TrainLoader(fifty, encoder, options, global_batch_size=10, seed=7, rank=rank, world_size=2)
        with loader:
            expected = [next(loader) for _ in range(5)]
        assert_equal_steps(pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()), expected)  # noqa: S301 (our own)
    answered = [request for request in server.of_shards() if not (request.start % 7 == 0 and request.number == 0)]
    assert len(answered) == 2 * len(fifty)  # both together: each record and each sample's images once
    samples = [request for request in server.requests if request.path.endswith(SAMPLES_FILE) and request.stop > 1]
    assert len([r for r in samples if not (r.start % 7 == 0 and r.number == 0)]) == 1


def make_loader(index, encoder, options, **changes):
    options = options.model_copy(update=changes)
    return TrainLoader(index, encoder, options, global_batch_size=10, seed=7, rank=0, world_size=1)


def test_a_second_epoch_makes_no_request_where_the_cache_holds_the_set(load, server, encoder, options):
    with make_loader(load(), encoder, options) as loader:
        for _ in range(7):  # two steps are built ahead
            next(loader)
        before = len(server.requests)
        for _ in range(5):
            next(loader)
        assert len(server.requests) == before


def used_on_disk(cache_folder):
    """Bytes, while nothing is made or deleted; what is renamed meanwhile counts once or not at all."""
    with open(cache_folder / "usage", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for path in cache_folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino] = status.st_blocks * 512
        return sum(sizes.values())


def test_a_cache_smaller_than_the_set_keeps_its_bound(write_set, serve, remote, encoder, options, make_jpeg, tmp_path):
    folder = write_set(
        "large", [3] * 40, images={i: [make_jpeg(9 * i + j, width=900) for j in range(3)] for i in range(40)}
    )
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    limit = size // 3
    server = serve(folder.parent)
    index = ShardIndex.load(f"{server.url}/large", remote=remote.model_copy(update={"cache_bytes": limit}))
    cache_folder, most, expected = Path(remote.cache_dir), 0, make_loader(ShardIndex.load(folder), encoder, options)
    with make_loader(index, encoder, options) as loader, expected:
        for _ in range(8):  # two epochs
            assert_equal_steps([next(loader)], [next(expected)])
            most = max(most, used_on_disk(cache_folder))
    index.close()
    assert limit / 2 < most <= limit


def test_a_loader_that_resumes_late_asks_for_what_is_left_alone(fifty, load, server, encoder, options):
    with make_loader(fifty, encoder, options) as loader:
        steps = [next(loader) for _ in range(5)]
    index = load()
    before = len(server.requests)
    loader = make_loader(index, encoder, options, num_workers=0)
    loader.load_cursor(json.loads(json.dumps(steps[3].cursor)))
    with loader:
        assert_equal_steps([next(loader)], steps[4:])
    assert len(server.requests) - before == 2 * 10
    assert before <= 4  # the index: its size and content, and the samples'


def test_validation_and_preflight_read_over_http(fifty, load, encoder, options):
    arguments = {"batch_size": 16, "rank": 0, "world_size": 1}
    assert_equal_steps(
        list(evaluation_steps(load(), encoder, options, **arguments)),
        list(evaluation_steps(fifty, encoder, options, **arguments)),
    )
    assert largest_sample(load(), encoder) == largest_sample(fifty, encoder)


def test_a_mixture_of_a_folder_and_a_url_reads_as_one_of_two_folders(fifty, write_set, load, encoder, options):
    here = ShardIndex.load(write_set("here", [1, 2] * 10))
    weights = {"a": 1.0, "b": 2.0}
    with (
        make_loader(MixedIndex({"a": fifty, "b": here}, weights), encoder, options) as local,
        make_loader(MixedIndex({"a": load(), "b": here}, weights), encoder, options) as mixed,
    ):
        assert_equal_steps([next(mixed) for _ in range(8)], [next(local) for _ in range(8)])


# What fails and passes.

PASSING = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429, headers={"Retry-After": "0"}),
    "408": Fault(status=408),
    "reset in the middle": Fault(send=300, reset=True),
    "reset before the body": Fault(send=0, reset=True),
    "truncated": Fault(send=300),
    "slow": Fault(wait=1.5),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again(fifty, load, server, fault, monkeypatch):
    monkeypatch.setattr(storage, "READ_SECONDS", 0.5)
    times = 1 if fault.wait else 3
    server.fault = on("", fault, times=times)  # of the index too
    index = load()
    assert index.read_sample(4) == fifty.read_sample(4)
    asked = [request for request in server.of_shards() if request.path.endswith(fifty.shards[0])]
    assert len(asked) == 2 * (times + 1)


def test_a_short_answer_that_no_header_tells_of_is_tried_again(fifty, load, monkeypatch):
    index, asked, fetch = load(), [], storage.Store._fetch

    def short(*arguments):
        asked.append(arguments)
        return fetch(*arguments)[: -1 if len(asked) < 3 else None]

    monkeypatch.setattr(storage.Store, "_fetch", short)
    assert index.read_record(0) == fifty.read_record(0)
    assert len(asked) == 3


def test_retry_after_is_waited_for(load, server, monkeypatch):
    monkeypatch.setattr(storage, "_LONGEST_WAIT", 30.0)
    waited = []
    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waited.append))
    server.fault = on(".tar", Fault(status=429, headers={"Retry-After": "7"}), times=1)
    load().read_record(0)
    assert waited == [7.0]


def test_waits_grow_and_differ_between_ranks():
    error = ConnectionResetError()
    waits = [[storage._wait(error, tries) for tries in range(1, 9)] for _ in range(20)]
    assert len({row[3] for row in waits}) > 10
    assert all(0.5 * most <= row[i] <= most for row in waits for i, most in enumerate([0.02, 0.04, 0.08, *[0.1] * 5]))


def test_what_does_not_pass_is_an_error_of_the_shard_that_names_url_and_range(load, server):
    index = load(retry_seconds=0.3)
    server.fault = on(index.shards[1], Fault(status=500))
    i = next(i for i, entry in enumerate(index.entries) if entry.shard == 1)
    with pytest.raises(
        ShardError, match=rf"{index.entries[i].key}: {server.url}/fifty/shard-000001\.tar: bytes \d+-\d+: .*500"
    ) as caught:
        index.read_record(i)
    assert (
        caught.value.shard == 1 and "attempts" in str(caught.value) and "data.remote.retry_seconds" in str(caught.value)
    )
    assert len(server.of_shards()) > 2
    assert index.read_record(0).key == index.entries[0].key  # of another shard


@pytest.mark.parametrize("status", [403, 404, 401])
def test_what_will_not_pass_is_not_tried_again(load, server, status):
    index = load()
    server.fault = on(".tar", Fault(status=status))
    with pytest.raises(ShardError, match="not there" if status == 404 else "access denied"):
        index.read_record(0)
    assert len(server.of_shards()) == 1


def test_a_store_that_is_down_is_waited_for_once_and_not_for_each_sample(load, server, monkeypatch):
    index = load(retry_seconds=0.5)
    server.fault = on(".tar", Fault(status=503))
    found = index.read_records(range(len(index)))
    assert all(isinstance(error, ShardError) for error in found)
    late = found[-1]
    before = len(server.of_shards())
    index.read_records([0, 20, 40])
    assert len(server.of_shards()) - before == 3, late  # one attempt each from now on
    server.fault = lambda request: None
    assert index.read_record(0).key == index.entries[0].key  # it is back
    once = [Fault(status=503)]
    server.fault = lambda request: once.pop() if once else None
    assert index.read_record(30).key == index.entries[30].key  # and is given time again


def test_a_shard_that_is_gone_is_quarantined_and_the_run_goes_on(load, server, encoder, options):
    index = load()
    server.fault = on(index.shards[3], Fault(status=404))
    with make_loader(index, encoder, options, max_bad_fraction=0.5) as loader:
        steps = [next(loader) for _ in range(5)]
    assert [name for step in steps for name in step.quarantined] == [index.shards[3]]
    assert {key for step in steps for key in step.skipped} == {e.key for e in index.entries if e.shard == 3}


# What is not what it was.


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(fifty, load, server):
    index = load()
    index.read_record(0)
    path = fifty.folder / fifty.shards[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")  # of the same size: another ETag
    with pytest.raises(ShardError, match="was replaced while it is read: ETag"):
        index.read_record(1)
    path.write_bytes(content + bytes(512))
    with pytest.raises(
        ShardError, match=rf"{len(content) + 512} bytes, the index says {len(content)}: it was replaced"
    ):
        load().read_record(2)
    path.write_bytes(content[:2000])
    last = max(i for i, entry in enumerate(fifty.entries) if entry.shard == 0)
    with pytest.raises(ShardError, match="it was cut off"):
        load().read_record(last)


def test_a_damaged_image_never_passes_whatever_the_options_say(fifty, load, server):
    index = load()
    record = index.read_record(0)
    ((run, _),) = reading._runs(0, index.entries[0].images)
    server.fault = lambda request: Fault(body=bytes(run[2] - run[1])) if request.start == run[1] else None
    with pytest.raises(DataError, match=r"sha256 is .*: damaged or replaced"):
        index.read_images(0, record, verify=False)


def test_a_record_with_another_text_is_refused(fifty, load, server):
    index = load()
    offset, size = index.entries[3].record
    with open(fifty.folder / fifty.shards[0], "rb") as stream:
        record = stream.read()[offset : offset + size]
    changed = record.replace(b"a red fox ", b"a fox").ljust(size)
    server.fault = lambda request: Fault(body=changed) if request.start == offset else None
    with pytest.raises(DataError, match="bytes of text, the index expects"):
        index.read_record(3)


def test_a_set_that_changed_is_never_mixed_with_what_the_cache_holds(fifty, write_set, load, server):
    before = everything(load())
    shutil.rmtree(fifty.folder)
    other = ShardIndex.load(write_set("fifty", [2] * 30, max_samples_per_shard=15))
    index = load()
    assert index.digest == other.digest != fifty.digest
    assert everything(index) == everything(other) != before[:30]


def test_a_set_whose_texts_alone_changed_is_not_read_from_the_cache(fifty, load):
    before = everything(load())
    for name in fifty.shards:
        path = fifty.folder / name
        path.write_bytes(path.read_bytes().replace(b"a red fox", b"a red cat"))  # all stays where it is
    other = build_index(fifty.folder)
    assert [entry.record for entry in other.entries] == [entry.record for entry in fifty.entries]
    assert everything(load()) == everything(other) != before


def test_the_samples_file_of_another_index_is_refused_and_not_kept(fifty, load):
    path = fifty.folder / SAMPLES_FILE
    content = path.read_bytes()
    path.write_bytes(content.replace(b"story", b"STORY"))
    with pytest.raises(DataError, match=r"index\.jsonl: does not belong to index\.json"):
        load()
    path.write_bytes(content)
    assert load().entries == fifty.entries


# Hostile servers.


def rewrite(folder, *, shards=lambda s: None, lines=lambda b: b):
    header = json.loads((folder / INDEX_FILE).read_text())
    shards(header["shardlist"])
    samples = lines((folder / SAMPLES_FILE).read_bytes())
    (folder / SAMPLES_FILE).write_bytes(samples)
    (folder / INDEX_FILE).write_text(json.dumps(header_of(header["shardlist"], samples)))


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar",
        "..",
        "/etc/passwd",
        "a/b.tar",
        "http://other/x.tar",
        "x.tar?a=b",
        "x#y",
        "%2e%2e",
        ".hidden",
        "a\\b",
        "",
        7,
        "x\n",
    ],
)
def test_names_that_are_no_plain_names_are_refused(fifty, load, server, name):
    rewrite(fifty.folder, shards=lambda s: s[1].update(url=name))
    with pytest.raises(DataError, match=r"shard .* is not a file name"):
        load()
    assert not server.of_shards()


def test_absurd_sizes_and_extents_are_refused(fifty, load, server):
    for size in (-1, 1.5, "9", True, None):
        rewrite(fifty.folder, shards=lambda s, size=size: s[1].update(filesize=size))
        with pytest.raises(DataError, match="the size of shard"):
            load()
    rewrite(fifty.folder, shards=lambda s: s[1].update(filesize=10**15))
    index = load()  # HTTP cannot list: refused when it is first read
    with pytest.raises(ShardError, match="the index says 1000000000000000"):
        index.read_record(20)


@pytest.mark.parametrize("line", [b'{"record": 5}', b"[" * 100_000, b'{"key": 1}', b"\xff", b'{"shard": 0.5}'])
def test_a_hostile_samples_file_is_one_error(fifty, load, line):
    rewrite(fifty.folder, lines=lambda b: b + line + b"\n")
    with pytest.raises(DataError, match="not an index of samples"):
        load()


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{}", b"7", b'{"version": 1, "shardlist": 5, "samples_sha256": "x"}', b""]
)
def test_a_hostile_header_is_one_error(fifty, load, content):
    (fifty.folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"fifty/index\.json"):
        load()


def test_an_index_of_absurd_size_is_refused_before_it_is_fetched(fifty, load, server, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_REMOTE_SAMPLES_BYTES", 1000)
    with pytest.raises(DataError, match=r"index\.jsonl: \d+ bytes, more than the 1000 allowed"):
        load()
    monkeypatch.setattr(index_module, "MAX_REMOTE_HEADER_BYTES", 100)
    with pytest.raises(DataError, match=r"index\.json: \d+ bytes, more than the 100 allowed"):
        load()
    assert all(request.stop <= 1 for request in server.requests if request.path.endswith(SAMPLES_FILE))


LIES = {
    "the whole file": Fault(status=200, headers={"Content-Length": str(10**12)}),
    "more than was asked for": Fault(headers={"Content-Length": str(10**12)}),
    "another range": Fault(headers={"Content-Range": "bytes 5-9/100000"}),
    "no size": Fault(headers={"Content-Range": "bytes 0-9/*"}),
    "a body without end": Fault(headers={"Content-Length": None, "Transfer-Encoding": "chunked"}),
    "compressed": Fault(headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_answer_that_is_none_to_the_question_is_refused_before_its_body(load, server, lie):
    index = load()
    server.fault = on(".tar", lie)
    with pytest.raises(ShardError, match=r"range requests|range request needs|the server sends"):
        index.read_record(0)
    assert len(server.of_shards()) == 1


# Names of places.


@pytest.mark.parametrize(
    "text",
    ["pipe:cat /etc/passwd", "file:///tmp/x", "ftp://host/x", "s3:/bucket/x", "simplecache::s3://b/x", "github://a:b@/x",
     "http://user:secret@host/x", "https://host/x?token=secret", "https://host/x#y", "s3://", "https://host:port/x",
     "s3://bucket/a/../b", "https://host/a b", "memory://x"],
)  # fmt: skip
def test_other_urls_are_refused_without_showing_secrets(text):
    with pytest.raises(ConfigError) as caught:
        parse_location(text)
    assert "user:secret" not in str(caught.value)


def test_folders_and_urls_are_told_apart():
    assert parse_location("data/x") == Path("data/x") and parse_location("./a:b") == Path("./a:b")
    assert parse_location("/a/b:c") == Path("/a/b:c")
    place = parse_location("s3://bucket/set/")
    assert (str(place), str(place / "train"), place.name) == ("s3://bucket/set", "s3://bucket/set/train", "set")
    assert isinstance(parse_location("abfs://container@account.dfs.core.windows.net/x"), Url)


def test_a_store_whose_library_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://bucket/x: gs:// needs `pip install 'samtrain\[gs\]'`"):
        ShardIndex.load("gs://bucket/x")


def test_a_url_without_an_index_is_named(server, remote):
    with pytest.raises(DataError, match=rf"{server.url}/nowhere/train/index\.json: not there; .* should be a folder"):
        load_split(f"{server.url}/nowhere", "train", key="data.path", remote=remote)
    closed = remote.model_copy(update={"retry_seconds": 0.2})
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1/x/index\.json: cannot be read: .*store reachable"):
        ShardIndex.load("http://127.0.0.1:1/x", remote=closed)


def test_nothing_of_the_network_is_imported_before_a_url_is_read():
    script = "import sys, samtrain.data.index; assert not {'fsspec', 'aiohttp', 's3fs'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


# Commands.


def test_stats_and_show_work_on_a_url_and_lint_says_what_it_needs(fifty, server, run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    url = f"{server.url}/fifty"
    for place, name in ((url, "remote"), (fifty.folder, "local")):
        code, _, err = run_cli("stats", place, "--json", tmp_path / f"{name}.json")
        assert code == 0, err
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("remote", "local"))
    assert ours.pop("path") == url and theirs.pop("path") and ours == theirs
    code, _out, _ = run_cli("show", url, "--key", "fifty-0003", "-o", tmp_path / "x.png")
    assert code == 0 and (tmp_path / "x.png").exists()
    code, _, err = run_cli("lint", url)
    assert code == 2 and "copy the set to one first" in err
    code, _, err = run_cli("stats", "pipe:cat x")
    assert code == 2 and "s3://" in err


def test_sources_of_a_mixture_may_be_urls(server):
    assert SourceOptions(name="a", path=f"{server.url}/fifty", weight=1.0).path.startswith("http")


# S3.


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """A server of the S3 protocol in a process of its own, with a bucket: (client, url of the bucket)."""
    pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    script = (
        "from moto.server import ThreadedMotoServer\nimport time\n"
        "s = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\ns.start()\n"
        "print(s.get_host_and_port()[1], flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="sets")
    yield client
    process.kill()
    process.wait()
    process.stdout.close()


def upload(client, folder, prefix):
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), "sets", f"{prefix}/{path.name}")


def test_a_set_in_s3_is_the_set_in_the_folder_and_its_changes_are_noticed(
    fifty, s3, remote, encoder, options, run_cli, tmp_path, monkeypatch
):
    upload(s3, fifty.folder, "mine/train")
    index = ShardIndex.load("s3://sets/mine/train", remote=remote)
    assert everything(index) == everything(fifty)
    with make_loader(index, encoder, options) as loader, make_loader(fifty, encoder, options) as local:
        assert_equal_steps([next(loader) for _ in range(5)], [next(local) for _ in range(5)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    code, out, err = run_cli("stats", "s3://sets/mine")  # the splits are found
    assert code == 0 and "train" in out, err

    fresh = remote.model_copy(update={"cache_dir": str(tmp_path / "fresh")})
    index = ShardIndex.load("s3://sets/mine/train", remote=fresh)
    content = (fifty.folder / fifty.shards[0]).read_bytes()
    s3.put_object(Bucket="sets", Key=f"mine/train/{fifty.shards[0]}", Body=content[:-1] + b"x")
    with pytest.raises(ShardError, match="was replaced while it is read"):
        index.read_record(0)
    s3.put_object(Bucket="sets", Key=f"mine/train/{fifty.shards[0]}", Body=content[:-512])
    s3.delete_object(Bucket="sets", Key=f"mine/train/{fifty.shards[1]}")
    with pytest.raises(ShardError, match=rf"{len(content) - 512} bytes, the index says {len(content)}"):
        ShardIndex.load("s3://sets/mine/train", remote=fresh)
    broken = ShardIndex.load("s3://sets/mine/train", remote=fresh, tolerate_broken_shards=True).broken_shards
    assert sorted(broken) == [0, 1] and "this shard is missing" in broken[1]
    with pytest.raises(DataError, match=r"s3://sets/nothing(/index\.json)?: not there"):
        ShardIndex.load("s3://sets/nothing", remote=fresh)
    with pytest.raises(DataError, match=r"s3://other/x(/index\.json)?: not there"):
        ShardIndex.load("s3://other/x", remote=fresh)
