"""The disk cache under real processes: several writers, kill -9, damage, a disk that refuses."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from samtrain.core.errors import ConfigError
from samtrain.data.cache import DiskCache

MIB = 2**20
WRITER = """
import random, sys, time
from samtrain.data.cache import DiskCache
cache, seed, seconds = DiskCache(sys.argv[1], max_bytes=int(sys.argv[2])), int(sys.argv[3]), float(sys.argv[4])
draw, end, blob, kept = random.Random(seed), time.monotonic() + seconds, bytes(range(256)) * 600, 0
print("begun", flush=True)
while time.monotonic() < end:
    key = f"k{draw.randrange(300)}"
    data = cache.get(key)
    size = 1000 + int(key[1:]) * 500
    assert data is None or data == blob[:size], key
    if data is None:
        kept += cache.put(key, blob[:size])
print(kept)
"""


def start(folder, max_bytes, seed, seconds):
    arguments = [sys.executable, "-c", WRITER, str(folder), str(max_bytes), str(seed), str(seconds)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    return process


def du(folder: Path) -> int:
    """Bytes on disk; files that vanish meanwhile do not count."""
    total = 0
    for path in [folder, *folder.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def entries(folder):
    return [path for path in (folder / "entries").rglob("*") if path.is_file()]


def test_what_was_put_is_there_for_another_process_and_keys_stay_apart(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=MIB)
    assert cache.get("a") is None
    assert cache.put("a", b"one") and cache.put("b", b"") and cache.put("a", b"two")
    other = DiskCache(tmp_path, max_bytes=MIB)
    assert (other.get("a"), other.get("b"), other.get("c")) == (b"two", b"", None)


@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "other"])
def test_a_damaged_entry_is_a_miss_and_goes(tmp_path, damage):
    cache = DiskCache(tmp_path, max_bytes=MIB)
    cache.put("a", b"x" * 5000)
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    changed = {
        "flip": content[:99] + b"y" + content[100:],
        "cut": content[:4000],
        "zero": bytes(len(content)),  # what a power cut may leave
    }
    if damage == "other":  # a whole entry, under another's name
        cache.put("b", b"z" * 5000)
        (other,) = set(entries(tmp_path)) - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(changed[damage])
    assert cache.get("a") is None
    assert not path.exists()
    assert cache.fetch("a", lambda: b"again") == b"again" == cache.get("a")


def test_the_least_recently_used_goes_first(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=MIB)
    for i in range(8):
        cache.put(f"k{i}", bytes(90_000))
        time.sleep(0.01)
    assert cache.get("k0") is not None  # used again
    for i in range(8, 14):
        time.sleep(0.01)
        cache.put(f"k{i}", bytes(90_000))
    assert cache.get("k0") is not None and cache.get("k13") is not None
    assert cache.get("k1") is None and cache.get("k2") is None


def test_four_processes_hold_one_bound_and_read_what_they_wrote(tmp_path):
    limit = 6 * MIB  # of 22 that are asked for
    writers = [start(tmp_path, limit, seed, 3) for seed in range(4)]
    most = 0
    while any(writer.poll() is None for writer in writers):
        time.sleep(0.05)
        for writer in writers:
            writer.send_signal(signal.SIGSTOP)
        most = max(most, du(tmp_path))  # of one moment
        for writer in writers:
            writer.send_signal(signal.SIGCONT)
    for writer in writers:
        out, err = writer.communicate()
        assert writer.returncode == 0, err
        assert int(out) > 50
    assert limit / 2 < most <= limit
    assert DiskCache(tmp_path, max_bytes=limit).used_bytes() <= limit


def test_what_is_being_written_takes_its_room_before_it_is(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=MIB)
    for i in range(5):
        cache._reserve(100_000, tmp_path / "entries" / "0" / f".writing-{i}", 100_000)
    assert cache.used_bytes() >= 500_000


def test_killed_writers_leave_nothing_torn_and_the_bound_still_holds(tmp_path):
    limit = 2 * MIB
    for seed in range(6):
        writer = start(tmp_path, limit, seed, 60)
        time.sleep(0.1 + 0.03 * seed)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close(), writer.stderr.close()
        assert du(tmp_path) <= limit
    (tmp_path / "entries" / "3" / ".1-2-3").write_bytes(bytes(200_000))  # one that was killed while it wrote
    last = start(tmp_path, limit, 99, 1)
    out, err = last.communicate()
    assert last.returncode == 0, err  # all it read was right
    assert int(out) > 0
    assert du(tmp_path) <= limit
    assert not (tmp_path / "entries" / "3" / ".1-2-3").exists()


def test_of_many_that_want_one_thing_one_fetches_it(tmp_path):
    script = """
import sys, os, time, threading
from samtrain.data.cache import DiskCache
cache, log = DiskCache(sys.argv[1], max_bytes=2**20), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def load(key):
    os.write(log, f"{key}\\n".encode())
    time.sleep(0.05)
    return key.encode()
def work():
    for i in range(10):
        assert cache.fetch(f"k{i}", lambda: load(f"k{i}")) == f"k{i}".encode()
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
    arguments = [sys.executable, "-c", script, str(tmp_path / "cache"), str(tmp_path / "log")]
    processes = [subprocess.Popen(arguments) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == [f"k{i}" for i in range(10)]


def test_who_is_killed_while_fetching_holds_up_nobody(tmp_path):
    script = """
import sys, time
from samtrain.data.cache import DiskCache
DiskCache(sys.argv[1], max_bytes=2**20).fetch("a", lambda: print("in", flush=True) or time.sleep(60))
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"in\n"
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(DiskCache(tmp_path, max_bytes=MIB).fetch("a", lambda: b"mine"))
    )
    waiting.start()
    time.sleep(0.2)
    assert not found
    process.kill(), process.wait(), process.stdout.close()
    waiting.join(30)
    assert found == [b"mine"]


def test_a_disk_that_refuses_costs_no_data(tmp_path):
    """A real limit of the system: no file beyond 20 kB."""
    script = """
import resource, sys, logging
from samtrain.data.cache import DiskCache
logging.basicConfig()
cache = DiskCache(sys.argv[1], max_bytes=2**20)
assert cache.put("small", b"s" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
assert cache.fetch("large", lambda: b"x" * 100_000) == b"x" * 100_000
assert cache.fetch("large", lambda: b"x" * 100_000) == b"x" * 100_000
assert cache.get("large") is None and cache.get("small") == b"s" * 1000
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written") == 1  # said once, not at each sample
    assert len(entries(tmp_path)) == 1  # nothing half-written is left


def test_a_cache_that_is_deleted_under_its_user_begins_anew(tmp_path):
    import shutil

    cache = DiskCache(tmp_path / "cache", max_bytes=MIB)
    cache.put("a", b"x")
    shutil.rmtree(tmp_path / "cache")
    assert cache.fetch("a", lambda: b"y") == b"y"
    assert cache.fetch("a", lambda: b"y") == b"y" == cache.get("a")


def test_the_bound_leaves_half_of_the_disk_and_says_when_there_is_less(tmp_path, monkeypatch):
    free = [100 * MIB]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    cache = DiskCache(tmp_path)
    assert cache.max_bytes == 50 * MIB
    cache.put("a", bytes(10 * MIB))
    free[0] -= cache.used_bytes()
    assert abs(DiskCache(tmp_path).max_bytes - 50 * MIB) < MIB  # whoever opens it later has the same bound
    assert "0.0 GiB at most" in cache.describe() and "more than there is" not in cache.describe()
    assert "data.remote.cache_bytes is more than there is" in DiskCache(tmp_path, max_bytes=2**40).describe()


def test_what_is_too_large_for_it_is_not_kept_and_nothing_goes_for_it(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=MIB)
    cache.put("a", b"x")
    assert not cache.put("large", bytes(MIB))
    assert cache.get("a") == b"x"
    assert not DiskCache(tmp_path / "none", max_bytes=0).put("a", b"x")


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.remote\.cache_dir: .*file/x cannot be written"):
        DiskCache(tmp_path / "file" / "x", max_bytes=MIB)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert DiskCache(max_bytes=MIB).folder == tmp_path / "xdg" / "samtrain" / "shards"
    assert os.stat(tmp_path / "xdg" / "samtrain" / "shards").st_mode & 0o077 == 0
