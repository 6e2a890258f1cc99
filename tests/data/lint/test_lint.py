"""Every kind of finding, planted for real in real tars; a clean set has none."""

import hashlib
import io
import json
import random
import shutil
import struct
import tarfile
import zlib

import pytest
from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data.index import INDEX_FILE, SAMPLES_FILE, ShardIndex
from samtrain.data.lint import KINDS, Limits, find_splits, lint
from samtrain.data.shards import build_index, sniff_image


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def sample_members(key, images, /, **changes):
    """The members of a sample that is right but for `changes` of its record."""
    references = []
    for i, data in enumerate(images):
        extension, width, height = sniff_image(data, where=key)
        digest = hashlib.sha256(data).hexdigest()
        references.append({"file": f"{key}.{i}.{extension}", "width": width, "height": height, "sha256": digest})
    record = {"key": key, "task": "t", "instruction": f"what is {key}", "output": "that", "images": references}
    members = [(reference["file"], data) for reference, data in zip(references, images)]
    return [*members, (f"{key}.json", json.dumps(record | changes).encode())]


def found(report, kind=None):
    return [(f.kind, f.split, f.shard, f.key) for f in report.findings if kind in (None, f.kind)]


def kinds(report):
    return {finding.kind for finding in report.findings}


def reasons(report):
    return " | ".join(finding.reason for finding in report.findings)


def png_that_claims(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture
def one_bad(tmp_path, make_jpeg):
    """A folder with a good sample, the members under test and another good sample; lint(...) of it."""

    def run(members, limits=None):
        good = [sample_members(key, [make_jpeg(seed)]) for key, seed in (("good-1", 1), ("good-2", 2))]
        write_tar(tmp_path / "set" / "x.tar", [*good[0], *members, *good[1]])
        report = lint(tmp_path / "set", limits=limits)
        assert {"index-missing"} == kinds(report) - KINDS_OF_SAMPLES
        good_keys = {sample.key for split in report.splits for sample in split.samples if report.is_good(sample)}
        assert good_keys >= {"good-1", "good-2"}
        return report

    return run


KINDS_OF_SAMPLES = set(KINDS) - {"index-missing", "index-broken", "index-disagrees", "missing-shard"}


def test_a_clean_set_has_no_finding(fifty):
    report = lint(fifty.folder)
    assert report.is_clean and report.findings == []
    (split,) = report.splits
    assert [sample.key for sample in split.samples] == [entry.key for entry in fifty.entries]
    assert all(report.is_good(sample) for sample in split.samples)
    assert report.to_dict()["splits"]["fifty"]["images"] == sum(entry.num_images for entry in fifty.entries)


def test_processes_find_what_one_process_finds(fifty):
    path = fifty.folder / fifty.shards[1]
    path.write_bytes(path.read_bytes()[:9000])
    alone, many = lint(fifty.folder), lint(fifty.folder, num_workers=3)
    assert alone.findings and alone.findings == many.findings


def test_progress_reaches_its_total(fifty):
    told = {}
    lint(fifty.folder, progress=lambda what, done, total: told.update({what: (done, total)}))
    assert told == {"reading shards": (4, 4), "checking samples": (50, 50)}


@pytest.mark.parametrize(
    ("kind", "plant", "reason"),
    [
        ("missing-record", lambda m: [x for x in m if not x[0].endswith(".json")], "0.jpg"),
        ("missing-image", lambda m: m[1:], "names 'bad.0.jpg', the tar has 1.jpg, json"),
        ("unlisted-image", lambda m: [*m, ("bad.7.png", b"x")], "bad.7.png"),
        ("duplicate-member", lambda m: [m[0], *m], "bad.0.jpg"),
        ("broken-image", lambda m: [(m[0][0], m[0][1][:300]), *m[1:]], "0.jpg: cannot be decoded"),
        ("broken-image", lambda m: [(m[0][0], b"<html>not found</html>"), *m[1:]], "not a JPEG, PNG or WEBP"),
        ("wrong-hash", lambda m: [(m[0][0], m[1][1]), *m[1:]], "0.jpg: sha256 is"),
        ("broken-record", lambda m: [*m[:-1], ("bad.json", b"{")], "JSONDecodeError"),
        ("broken-record", lambda m: [*m[:-1], ("bad.json", b'{"key": "bad"}')], "KeyError: 'instruction'"),
        ("broken-record", lambda m: [*m[:-1], ("bad.json", m[-1][1] + b"\xff")], "not UTF-8 at byte"),
        ("broken-record", lambda m: [*m[:-1], ("bad.json", b"[" * 100_000)], "Recursion"),
        ("broken-record", lambda m: [*m[:-1], ("bad.json", m[-1][1].replace(b"what is", b"\\ud800"))], "surrogate"),
    ],
)
def test_a_bad_sample_is_found_and_its_neighbours_are_good(one_bad, make_jpeg, kind, plant, reason):
    members = sample_members("bad", [make_jpeg(3), make_jpeg(4)])
    report = one_bad(plant(members))
    assert (kind, "set", "x.tar", "bad") in found(report)
    assert reason in reasons(report)
    assert report.counts[kind] == 1


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("wrong-key", {"key": "other"}, "its record says 'other'"),
        ("wrong-count", {"instruction": "<image> <image> <image> three"}, "3 <image> placeholders, 2 images"),
        ("wrong-count", {"instruction": "<image> one"}, "1 <image> placeholders, 2 images"),
        ("missing-image", {"images": [{"file": "../../etc/passwd", "width": 1, "height": 1, "sha256": ""}]}, "passwd"),
        ("broken-record", {"images": 5}, "TypeError"),
        ("broken-record", {"task": 5}, "`task` is 5"),
        ("broken-record", {"surprise": 5}, "surprise"),
        ("empty-text", {"output": " \n"}, "output"),
        ("empty-text", {"instruction": "<image><image>"}, "instruction"),
        ("unreadable-text", {"output": "caf\ufffd"}, "U+FFFD at character 3"),
        ("unreadable-text", {"output": "a\x00b"}, "U+0000 at character 1"),
        ("unreadable-text", {"instruction": "see \x92 here"}, "instruction: U+0092"),
    ],
)
def test_a_bad_record_is_found(one_bad, make_jpeg, kind, change, reason):
    report = one_bad(sample_members("bad", [make_jpeg(3), make_jpeg(4)], **change))
    assert (kind, "set", "x.tar", "bad") in found(report) and reason in reasons(report)


@pytest.mark.parametrize("text", ["Ünïcode é 中文 العربية 🦊 ✓", "line\nbreak\ttab", "≤ ∑ “quotes” — dash"])
def test_text_in_any_language_is_readable(one_bad, make_jpeg, text):
    report = one_bad(sample_members("fine", [make_jpeg(3)], instruction=text, output=text))
    assert kinds(report) == {"index-missing"}


def test_a_size_that_is_not_the_records_is_found(one_bad, make_jpeg):
    members = sample_members("bad", [make_jpeg(3)])
    record = json.loads(members[-1][1])
    record["images"][0]["width"] = 49
    report = one_bad([members[0], ("bad.json", json.dumps(record).encode())])
    assert found(report, "wrong-size") == [("wrong-size", "set", "x.tar", "bad")]
    assert "48 x 40, its record says 49 x 40" in reasons(report)


def test_a_picture_that_a_camera_turned_has_the_right_size(one_bad):
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(stream, "JPEG", exif=exif)
    assert kinds(one_bad(sample_members("turned", [stream.getvalue()]))) == {"index-missing"}


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        ({"max_image_pixels": 48 * 40 - 1}, "oversized-image"),
        ({"max_member_bytes": 250}, "oversized-member"),
        ({"max_text_bytes": 11}, "oversized-text"),
    ],
)
def test_limits_are_kept_and_the_limit_itself_is_allowed(tmp_path, make_jpeg, limits, kind):
    write_tar(tmp_path / "set" / "x.tar", sample_members("a-key", [make_jpeg(1)]))
    assert kind in kinds(lint(tmp_path / "set", limits=Limits(**limits)))
    enough = {"max_image_pixels": 48 * 40, "max_member_bytes": 10_000, "max_text_bytes": len("what is a-key")}
    assert kinds(lint(tmp_path / "set", limits=Limits(**enough))) == {"index-missing"}


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_a_pixel_bomb_is_oversized_and_not_decoded(one_bad, side, recwarn):
    report = one_bad(
        [*sample_members("bomb", [png_that_claims(1, 1)])[1:], ("bomb.0.png", png_that_claims(side, side))]
    )
    assert ("oversized-image", "set", "x.tar", "bomb") in found(report)
    assert not [warning for warning in recwarn if "DecompressionBomb" in str(warning.category)]


@pytest.mark.parametrize("name", ["../../up.json", "/etc/x.json", "a/../b.json", "a\\b.json", "a b.json", ".json"])
def test_member_names_that_escape_are_found_and_nothing_is_written(one_bad, tmp_path, name):
    before = sorted(path for path in tmp_path.rglob("*"))
    report = one_bad([(name, b"{}")])
    assert found(report, "unsafe-name") == [("unsafe-name", "set", "x.tar", "")]
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == [tmp_path / "set", tmp_path / "set" / "x.tar"]


def test_links_are_found_and_never_followed(tmp_path, make_jpeg):
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "a.json"), (tarfile.LNKTYPE, "b.json"), (tarfile.CHRTYPE, "c.json")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in sample_members("good", [make_jpeg(1)]):
            add(tar, name, data)
    report = lint(folder)
    assert len(found(report, "not-a-file")) == 3
    assert [sample.key for sample in report.splits[0].samples] == ["good"]


# Damage of the tar itself.


def shard_bytes(make_jpeg, count=6):
    members = [m for i in range(count) for m in sample_members(f"s-{i}", [make_jpeg(i), make_jpeg(10 + i)])]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            add(tar, name, data)
    return stream.getvalue()


def lint_bytes(folder, data):
    folder.mkdir()
    (folder / "x.tar").write_bytes(data)
    return lint(folder)


@pytest.mark.parametrize("share", [0.0001, 0.1, 0.33, 0.5, 0.77, 0.9])
def test_a_cut_tar_is_found_wherever_it_is_cut_and_whole_samples_stay_good(tmp_path, make_jpeg, share):
    whole = shard_bytes(make_jpeg)
    end = whole.rstrip(b"\0")
    cut = int(len(end) * share)
    report = lint_bytes(tmp_path / "set", whole[:cut])
    assert "damaged-shard" in kinds(report)
    (split,) = report.splits
    good = [sample.key for sample in split.samples if report.is_good(sample)]
    assert good == [f"s-{i}" for i in range(len(good))] and len(good) in (int(6 * share), max(0, int(6 * share) - 1))


def test_a_tar_cut_between_samples_or_in_its_end_mark_is_found(tmp_path, make_jpeg, write_set):
    folder = write_set("cut", [1, 1])
    path, entries = folder / "shard-000000.tar", ShardIndex.load(folder).entries
    whole = path.read_bytes()
    end = entries[1].offset + entries[1].size
    for length in (entries[1].offset, end, end + 512):
        path.write_bytes(whole[:length])
        report = lint(folder)
        assert "no end-of-archive mark" in reasons(report), length
        assert {"damaged-shard", "index-disagrees"} == kinds(report)


def test_samples_behind_a_damaged_header_are_found_again(tmp_path, make_jpeg):
    data = bytearray(shard_bytes(make_jpeg))
    where = data.index(b"s-2.0.jpg")
    data[where : where + 100] = random.Random(0).randbytes(100)
    report = lint_bytes(tmp_path / "set", bytes(data))
    (split,) = report.splits
    assert [sample.key for sample in split.samples if report.is_good(sample)] == ["s-0", "s-1", "s-3", "s-4", "s-5"]
    assert found(report, "damaged-shard") == [("damaged-shard", "set", "x.tar", "")]
    assert found(report, "missing-image") == [("missing-image", "set", "x.tar", "s-2")]


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_never_crashes_and_never_passes(tmp_path, make_jpeg, seed):
    draw = random.Random(seed)
    whole = shard_bytes(make_jpeg)
    data = bytearray(whole)
    for _ in range(draw.randrange(1, 30)):
        at, size = draw.randrange(len(whole)), draw.choice([1, 16, 600])
        data[at : at + size] = draw.randbytes(size)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "x.tar").write_bytes(whole)
    build_index(folder)
    (folder / "x.tar").write_bytes(bytes(data))
    report = lint(folder)
    assert not report.is_clean
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False


@pytest.mark.parametrize("data", [b"", b"x", b"not a tar at all" * 300, bytes(10_240)])
def test_files_that_are_no_tars_are_found(tmp_path, data):
    report = lint_bytes(tmp_path / "set", data)
    assert kinds(report) & {"damaged-shard", "empty-shard"} and not report.splits[0].samples


def test_samples_behind_an_end_mark_are_told(tmp_path, make_jpeg):
    """`cat a.tar b.tar` makes a tar of which most readers see the first half only."""
    one = write_tar(tmp_path / "a.tar", sample_members("a", [make_jpeg(1)])).read_bytes()
    two = write_tar(tmp_path / "b.tar", sample_members("b", [make_jpeg(2)])).read_bytes()
    report = lint_bytes(tmp_path / "set", one + two)
    assert "end-of-archive mark, with members after it" in reasons(report)
    assert [sample.key for sample in report.splits[0].samples] == ["a", "b"]


# Duplicates.


def test_a_key_in_two_shards_and_in_two_splits_is_found_where_it_is_met_again(tmp_path, make_jpeg):
    for n, name in enumerate(("train/x.tar", "train/y.tar", "test/x.tar")):
        write_tar(tmp_path / name, sample_members("twin", [make_jpeg(n)], output=name))
    report = lint(tmp_path)
    assert sorted(found(report, "duplicate-key")) == [
        ("duplicate-key", "train", "x.tar", "twin"),
        ("duplicate-key", "train", "y.tar", "twin"),
    ]
    assert "test/x.tar" in reasons(report)


def test_a_key_twice_in_one_shard_is_found(one_bad, make_jpeg):
    members = sample_members("twin", [make_jpeg(3)])
    between = sample_members("between", [make_jpeg(4)])
    report = one_bad([*members, *between, *sample_members("twin", [make_jpeg(5)])])
    assert found(report, "duplicate-key") == [("duplicate-key", "set", "x.tar", "twin")]


def test_equal_samples_under_other_keys_are_found_and_the_held_out_one_stays(tmp_path, make_jpeg):
    images = [make_jpeg(1), make_jpeg(2)]
    write_tar(tmp_path / "train" / "x.tar", sample_members("a", images, instruction="same"))
    write_tar(tmp_path / "zest" / "x.tar", sample_members("b", images, instruction="same"))
    write_tar(tmp_path / "validation" / "x.tar", sample_members("c", images[::-1], instruction="same"))
    report = lint(tmp_path)
    assert found(report, "duplicate-sample") == [("duplicate-sample", "train", "x.tar", "a")]
    assert "equal to b in zest/x.tar" in reasons(report)


def test_the_same_images_with_another_question_are_no_duplicate(one_bad, make_jpeg):
    images = [make_jpeg(3)]
    assert kinds(one_bad([*sample_members("a", images), *sample_members("b", images)])) == {"index-missing"}


# The index.


def test_an_index_that_disagrees_is_found(fifty):
    shutil.copy(fifty.folder / fifty.shards[0], fifty.folder / "new.tar")
    (fifty.folder / fifty.shards[3]).unlink()
    report = lint(fifty.folder)
    assert found(report, "missing-shard") == [("missing-shard", "fifty", "shard-000003.tar", "")]
    assert found(report, "index-disagrees") == [("index-disagrees", "fifty", "new.tar", "")]
    assert report.counts["duplicate-key"] == 15
    lost = [entry.key for entry in fifty.entries if entry.shard == 3]
    assert report.to_dict()["splits"]["fifty"]["lost"] == {"shard-000003.tar": lost}


def test_one_changed_byte_between_members_is_noticed_by_the_shards_hash(fifty):
    path = fifty.folder / fifty.shards[0]
    data = bytearray(path.read_bytes())
    entry = fifty.entries[0]
    padding = entry.images[0][0] + entry.images[0][1]
    assert data[padding] == 0
    data[padding] = 1
    path.write_bytes(data)
    report = lint(fifty.folder)
    assert found(report) == [("index-disagrees", "fifty", "shard-000000.tar", "")]
    assert "its bytes have changed" in reasons(report)


def test_another_order_in_the_shard_is_noticed(fifty, tmp_path):
    """As large, as many, other places: what a set built again without its index looks like."""
    path = fifty.folder / fifty.shards[0]
    entries = [entry for entry in fifty.entries if entry.shard == 0]
    data = path.read_bytes()
    parts = [data[entry.offset : entry.offset + entry.size] for entry in entries]
    tail = data[entries[-1].offset + entries[-1].size :]
    path.write_bytes(b"".join(reversed(parts)) + tail)
    report = lint(fifty.folder)
    assert "samples lie elsewhere" in reasons(report)
    assert kinds(report) == {"index-disagrees"}


@pytest.mark.parametrize("name", [INDEX_FILE, SAMPLES_FILE])
def test_an_index_that_is_torn_is_found(fifty, name):
    path = fifty.folder / name
    path.write_bytes(path.read_bytes()[:-20])
    report = lint(fifty.folder)
    assert found(report) == [("index-broken", "fifty", "", "")]


# Sets, options, refusals.


def test_a_data_set_is_looked_at_split_by_split(write_set, tmp_path):
    write_set("train", [1, 2])
    write_set("test", [3])
    (tmp_path / "notes").mkdir()
    splits, is_set = find_splits(tmp_path)
    assert sorted(splits) == ["test", "train"] and is_set
    report = lint(tmp_path)
    assert [split.name for split in report.splits] == ["test", "train"]


def test_folders_without_shards_are_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            lint(path)


def test_ignored_kinds_are_listed_and_do_not_fail(tmp_path, make_jpeg):
    write_tar(tmp_path / "set" / "x.tar", sample_members("a", [make_jpeg(1)]))
    report = lint(tmp_path / "set", ignore=frozenset({"index-missing"}))
    assert report.is_clean and report.counts == {"index-missing": 1}
    with pytest.raises(DataError, match="--ignore typo: no such kind"):
        lint(tmp_path / "set", ignore=frozenset({"typo"}))


def test_every_kind_says_what_to_do():
    assert all(kind.what and kind.advice for kind in KINDS.values())
