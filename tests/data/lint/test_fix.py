"""The clean set beside a damaged one: the good samples, byte for byte, and a list of the others."""

import json
import resource
import subprocess
import sys

import pytest
import webdataset

from samtrain.core.errors import DataError
from samtrain.data.index import INDEX_FILE, ShardIndex
from samtrain.data.lint import lint
from samtrain.data.lint.fix import LEFT_OUT_FILE, write_clean
from samtrain.data.shards import ShardWriter


@pytest.fixture
def damaged(write_set, tmp_path, make_jpeg):
    """A set of two splits: a cut shard, a flipped byte, garbage for a picture, a sample of the test in training."""
    train = ShardIndex.load(write_set("set/train", [1 + i % 3 for i in range(30)], max_samples_per_shard=10))
    test = ShardIndex.load(write_set("set/test", [2] * 5))
    overwrite(train, 4, b"garbage")
    flip(train, 12)
    cut = train.folder / train.shards[2]
    with open(cut, "r+b") as stream:
        stream.truncate(train.entries[25].record[0] + 5)
    record, images = test.read_sample(3)
    with ShardWriter(tmp_path / "more") as writer:
        texts = {"instruction": record.instruction, "output": record.output}
        writer.write(key="leaked", task="t", images=images, extra={"0.mask.png": b"mask"}, **texts)
        writer.write(key="kept", task="t", images=[make_jpeg(999)], extra={"0.mask.png": b"mask"}, **texts)
    (tmp_path / "more" / "shard-000000.tar").rename(train.folder / "shard-000009.tar")
    (tmp_path / "set" / "ATTRIBUTION.md").write_text("pictures by somebody")
    return tmp_path / "set"


def overwrite(index, i, content):
    offset, size = index.entries[i].images[0]
    with open(index.folder / index.shards[index.entries[i].shard], "r+b") as stream:
        stream.seek(offset)
        stream.write((content * size)[:size])


def flip(index, i):
    offset, size = index.entries[i].images[0]
    with open(index.folder / index.shards[index.entries[i].shard], "r+b") as stream:
        stream.seek(offset + size // 2)
        byte = stream.read(1)[0]
        stream.seek(offset + size // 2)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture(autouse=True)
def make_split_folders(tmp_path):
    (tmp_path / "set").mkdir()


@pytest.fixture
def write_set(tmp_path, make_jpeg):
    """Keys without the folder's slash."""

    def write(name, counts, **options):
        with ShardWriter(tmp_path / name, **options) as writer:
            for i, count in enumerate(counts):
                key = f"{name.rpartition('/')[2]}-{i:04d}"
                writer.write(
                    key=key,
                    task="t",
                    instruction=f"what is {key}",
                    output="that",
                    images=[make_jpeg(len(name) + 100 * i + j) for j in range(count)],
                    source="s",
                    meta={"number": i},
                )
        return tmp_path / name

    return write


def test_the_clean_set_holds_the_good_samples_byte_for_byte(damaged, tmp_path):
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    report = lint(damaged)
    written = write_clean(report, tmp_path / "clean")
    again = lint(tmp_path / "clean")
    assert again.findings == []
    train, test = (ShardIndex.load(tmp_path / "clean" / name) for name in ("train", "test"))
    good = [f"train-{i:04d}" for i in range(25) if i not in (4, 12)] + ["kept"]
    assert [entry.key for entry in train.entries] == good
    assert [entry.key for entry in test.entries] == [f"test-{i:04d}" for i in range(5)]
    assert written["samples"] == len(good) + 5 and written["splits"] == {"test": 5, "train": len(good)}
    assert ShardIndex.load(damaged / "test").read_sample(2) == test.read_sample(2)
    samples = {
        s["__key__"]: s for s in webdataset.WebDataset([str(p) for p in train.folder.glob("*.tar")], shardshuffle=False)
    }
    assert samples["kept"]["0.mask.png"] == b"mask"
    assert (tmp_path / "clean" / "ATTRIBUTION.md").read_text() == "pictures by somebody"
    assert {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()} == before


def test_everything_left_out_is_listed_with_its_reasons(damaged, tmp_path):
    written = write_clean(lint(damaged), tmp_path / "clean")
    rows = [json.loads(line) for line in (tmp_path / "clean" / LEFT_OUT_FILE).read_text().splitlines()]
    by_key = {row["key"]: row for row in rows if row["key"]}
    assert {key: row["problems"][0]["kind"] for key, row in by_key.items()} == {
        "train-0004": "wrong-hash",
        "train-0012": "wrong-hash",
        "train-0025": "broken-record",
        "leaked": "duplicate-sample",
    } | dict.fromkeys([f"train-{i:04d}" for i in range(26, 30)], "index-disagrees")
    assert [p["kind"] for p in by_key["train-0004"]["problems"]] == ["wrong-hash", "broken-image"]
    lost = [row["key"] for row in rows if row["action"] == "lost"]
    assert lost == [f"train-{i:04d}" for i in range(26, 30)]
    assert {row["action"] for row in rows} == {"left out", "lost"}
    assert (written["left_out"], written["lost"]) == (4, 4)
    (shard,) = [row for row in rows if not row["key"]]
    assert shard["shard"] == "shard-000002.tar" and shard["problems"][0]["kind"] == "damaged-shard"


def test_a_wrong_size_in_the_record_is_mended(write_set, tmp_path):
    folder = write_set("set/train", [1, 1])
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"width": 48', b'"width": 84', 1))
    written = write_clean(lint(folder), tmp_path / "clean")
    assert (written["samples"], written["left_out"], written["mended"]) == (2, 0, 1)
    assert ShardIndex.load(tmp_path / "clean").read_record(0).images[0].width == 48
    assert json.loads((tmp_path / "clean" / LEFT_OUT_FILE).read_text())["action"] == "mended"


def test_ignored_duplicates_stay(damaged, tmp_path):
    write_clean(lint(damaged, ignore=frozenset({"duplicate-sample"})), tmp_path / "clean")
    assert "leaked" in [entry.key for entry in ShardIndex.load(tmp_path / "clean" / "train").entries]


def test_damage_cannot_be_ignored_into_a_clean_set(damaged, tmp_path):
    ignored = frozenset({"wrong-hash", "broken-image", "broken-record", "damaged-shard", "index-disagrees"})
    write_clean(lint(damaged, ignore=ignored), tmp_path / "clean")
    keys = {entry.key for entry in ShardIndex.load(tmp_path / "clean" / "train").entries}
    assert not keys & {"train-0004", "train-0012", "train-0025"}


def test_an_output_that_is_taken_or_inside_is_refused(damaged, tmp_path):
    report = lint(damaged)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    for output in (tmp_path / "taken", damaged / "clean", damaged, tmp_path / "taken" / "x"):
        with pytest.raises(DataError, match="--fix"):
            write_clean(report, output)
    assert (tmp_path / "taken" / "x").read_text() == "mine" and not (damaged / "clean").exists()


def test_a_split_without_a_good_sample_is_refused(damaged, tmp_path):
    for path in (damaged / "test").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="test has no good sample"):
        write_clean(lint(damaged), tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_shards_that_change_after_they_were_looked_at_are_noticed(damaged, tmp_path):
    report = lint(damaged)
    path = damaged / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="was changed while"):
        write_clean(report, tmp_path / "clean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more", "set"]


@pytest.mark.parametrize("kib", [1, 10, 40])
def test_a_full_disk_leaves_nothing_and_one_message(damaged, tmp_path, kib):
    """The limit on file sizes stands for the full disk: writing fails for real, at another place each time."""
    program = (
        "import sys, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
        "from samtrain.cli import main; sys.argv = ['samtrain', *sys.argv[2:]]; main()"
    )
    arguments = ["data", "lint", str(damaged), "--fix", str(tmp_path / "clean"), "--num-workers", "1"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", program, str(kib * 1024), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().endswith("nothing was left there") and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more", "set"]


def test_a_writer_on_a_full_disk_removes_what_it_wrote(tmp_path, make_jpeg):
    program = """
import resource, sys
from samtrain.data.shards import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with ShardWriter(sys.argv[1], max_samples_per_shard=4) as writer:
    for i in range(int(sys.argv[2])):
        writer.write(key=f"k{i}", task="t", instruction="i", output="o", images=[open(sys.argv[3], "rb").read()])
"""
    (tmp_path / "a.jpg").write_bytes(make_jpeg(1))
    for count in (3, 60):  # the index is too large at 60
        arguments = [str(tmp_path / "out"), str(count), str(tmp_path / "a.jpg")]
        if count == 3:
            (tmp_path / "a.jpg").write_bytes(make_jpeg(1, width=900, height=900) + bytes(20_000))
        else:
            (tmp_path / "a.jpg").write_bytes(make_jpeg(1))
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "File too large" in done.stderr
        assert list((tmp_path / "out").iterdir()) == []


def test_the_command_tells_what_it_found_and_exits_with_it(damaged, tmp_path, run_cli):
    code, out, _ = run_cli("lint", damaged, "--json", tmp_path / "report.json", "--fix", tmp_path / "clean")
    assert code == 1
    for text in ("damaged-shard", "train-0004", "shard-000002.tar", "What to do: copy", "4 left out"):
        assert text in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is False and report["counts"]["wrong-hash"] == 2 and report["fix"]["left_out"] == 4
    assert report["splits"]["train"]["good_samples"] == 24
    assert {"kind", "split", "shard", "key", "reason"} == set(report["findings"][0])
    code, out, _ = run_cli("lint", tmp_path / "clean")
    assert code == 0 and "nothing is wrong" in out


def test_the_command_refuses_wrong_use_with_2(damaged, tmp_path, run_cli):
    for arguments in (
        (tmp_path / "nowhere",),
        (damaged, "--ignore", "typo"),
        (damaged, "--fix", damaged),
        (damaged, "--num-workers", "0"),
        (damaged, "--no-such-option"),
        (),
    ):
        code, _, err = run_cli("lint", *arguments)
        assert code == 2 and err and "Traceback" not in err
    code, _, err = run_cli("lint", damaged / "test", "--json", tmp_path / "set" / "ATTRIBUTION.md" / "x.json")
    assert code == 2 and "cannot be written" in err


def test_an_interrupted_index_is_not_taken_for_a_set(damaged, run_cli):
    (damaged / "test" / INDEX_FILE).unlink()
    code, out, _ = run_cli("lint", damaged / "test", "--ignore", "index-missing")
    assert code == 0 and "(ignored)" in out
