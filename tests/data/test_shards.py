import io
import json
import random
import tarfile
import threading
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from samtrain.core.errors import DataError
from samtrain.data import index as index_module
from samtrain.data import reading as reading_module
from samtrain.data.index import INDEX_FILE, SAMPLES_FILE, ShardIndex
from samtrain.data.shards import ShardWriter, build_index, sniff_image


def write_one(writer, key="a", images=(), **changes):
    values = {"task": "t", "instruction": "what", "output": "that", "images": list(images)} | changes
    return writer.write(key=key, **values)


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def record_json(key, files=()):
    images = [{"file": file, "width": 1, "height": 1, "sha256": ""} for file in files]
    return json.dumps({"key": key, "task": "t", "instruction": "i", "output": "o", "images": images}).encode()


def test_what_was_written_is_read_back_byte_for_byte(tmp_path, make_jpeg):
    images = [make_jpeg(1), make_jpeg(2, image_format="PNG", width=9), make_jpeg(3, image_format="WEBP")]
    with ShardWriter(tmp_path) as writer:
        record = write_one(
            writer, "set/one-1", images, instruction="<image>é<image><image>", source="s", meta={"boxes": [[1, 2.5]]}
        )
    index = ShardIndex.load(tmp_path)
    assert index.read_sample(0) == (record, images)
    assert [image.file for image in record.images] == ["set/one-1.0.jpg", "set/one-1.1.png", "set/one-1.2.webp"]
    assert [(image.width, image.height) for image in record.images] == [(48, 40), (9, 40), (48, 40)]
    assert index.entries[0].num_images == 3
    assert index.entries[0].text_bytes == len("<image>é<image><image>".encode()) + len("that")


def test_webdataset_reads_our_shards(fifty):
    urls = [str(fifty.folder / name) for name in fifty.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 50
    for i, sample in enumerate(samples):
        record, images = fifty.read_sample(i)
        assert sample["__key__"] == record.key
        assert json.loads(sample["json"])["instruction"] == record.instruction
        assert [sample[f"{n}.jpg"] for n in range(len(images))] == images


@pytest.mark.filterwarnings("ignore:String specifications")
def test_wids_opens_our_index_file(fifty, tmp_path):
    wids = pytest.importorskip("wids")
    dataset = wids.ShardListDataset(
        str(fifty.folder / INDEX_FILE), localname=lambda url: url, transformations=lambda sample: sample, keep=True
    )
    assert len(dataset) == 50
    for i in (0, 14, 15, 31, 49):
        record, images = fifty.read_sample(i)
        sample = dataset[i]
        assert sample["__key__"] == record.key
        assert [sample[f".{n}.jpg"].read() for n in range(len(images))] == images


def test_more_than_ten_images_keep_their_order(write_set):
    index = ShardIndex.load(write_set("many", [12]))
    record, images = index.read_sample(0)
    assert [Path(image.file).name for image in record.images] == [f"many-0000.{n}.jpg" for n in range(12)]
    assert len(set(images)) == 12


def test_extra_members_are_stored_and_are_not_images(tmp_path, make_jpeg):
    mask = make_jpeg(5, image_format="PNG")
    with ShardWriter(tmp_path) as writer:
        write_one(writer, "a", [make_jpeg(1)], extra={"0.mask.png": mask})
    (sample,) = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    assert sample["0.mask.png"] == mask
    assert ShardIndex.load(tmp_path).entries[0].num_images == 1


def test_the_offset_and_size_of_an_entry_are_a_tar_of_that_sample(fifty):
    entry = fifty.entries[20]
    shard = (fifty.folder / fifty.shards[entry.shard]).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(shard[entry.offset : entry.offset + entry.size] + bytes(1024))) as tar:
        names = tar.getnames()
    assert names == [f"{entry.key}.{n}.jpg" for n in range(entry.num_images)] + [f"{entry.key}.json"]


def test_equal_input_gives_equal_bytes_and_digest_and_other_input_does_not(write_set):
    first, second = write_set("same", [1, 2, 3], max_samples_per_shard=2), None
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    first.rename(first.with_name("kept"))
    second = write_set("same", [1, 2, 3], max_samples_per_shard=2)
    assert {path.name: path.read_bytes() for path in second.iterdir()} == before
    second.rename(second.with_name("kept-too"))
    other = write_set("same", [1, 2, 2], max_samples_per_shard=2)
    assert ShardIndex.load(other).digest != ShardIndex.load(first.with_name("kept")).digest


def test_a_rebuilt_index_equals_the_written_one(fifty):
    before = {name: (fifty.folder / name).read_bytes() for name in (INDEX_FILE, SAMPLES_FILE)}
    for name in before:
        (fifty.folder / name).unlink()
    rebuilt = build_index(fifty.folder)
    assert rebuilt.digest == fifty.digest and rebuilt.entries == fifty.entries
    assert {name: (fifty.folder / name).read_bytes() for name in before} == before


def test_shards_roll_over_by_count_and_by_bytes(write_set):
    by_count = ShardIndex.load(write_set("count", [1] * 5, max_samples_per_shard=2))
    assert [entry.shard for entry in by_count.entries] == [0, 0, 1, 1, 2]
    by_bytes = ShardIndex.load(write_set("bytes", [1] * 3, max_shard_bytes=1))
    assert by_bytes.shards == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]


@pytest.mark.parametrize("key", ["../up", "/etc/x", "a/../b", "a.b", "", "a//b", "a\\b", "a b", "a\n", "x" * 81, "a/"])
def test_keys_that_escape_or_confuse_webdataset_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="not allowed"), ShardWriter(tmp_path / "set") as writer:
        write_one(writer, key)


def test_the_longest_key_works(tmp_path, make_jpeg):
    with ShardWriter(tmp_path) as writer:
        write_one(writer, "k" * 80, [make_jpeg(i) for i in range(11)], extra={"0.mask.png": b"x"})
    assert ShardIndex.load(tmp_path).read_record(0).key == "k" * 80


def test_a_key_written_twice_is_refused_with_its_name(tmp_path):
    with pytest.raises(DataError, match="twin: this key was written before"), ShardWriter(tmp_path / "set") as writer:
        write_one(writer, "twin")
        write_one(writer, "twin")


def test_more_placeholders_than_images_are_refused_when_written(tmp_path, make_jpeg):
    with pytest.raises(DataError, match="2 <image> placeholders but the sample has 1"), ShardWriter(tmp_path) as writer:
        write_one(writer, images=[make_jpeg(1)], instruction="<image> and <image>")


def test_unknown_image_formats_are_refused(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "BMP")
    for data in (stream.getvalue(), b"", b"<svg/>"):
        with pytest.raises(DataError, match="a: image 0: not a JPEG, PNG or WEBP"), ShardWriter(tmp_path) as writer:
            write_one(writer, images=[data])


@pytest.mark.parametrize("name", ["json", "0.jpg", "../x.png", "0.MASK.png", "mask"])
def test_extra_members_cannot_replace_or_escape(tmp_path, make_jpeg, name):
    with pytest.raises(DataError, match="extra member"), ShardWriter(tmp_path) as writer:
        write_one(writer, images=[make_jpeg(1)], extra={name: b"x"})


def test_an_interrupted_writer_leaves_nothing_that_looks_finished(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, max_samples_per_shard=1) as writer:
        write_one(writer, "a")
        write_one(writer, "b")
        assert not list(tmp_path.glob("*.tar"))
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_shards_is_not_overwritten(fifty):
    with pytest.raises(DataError, match="already holds shards"):
        ShardWriter(fifty.folder)


def test_a_writer_without_samples_is_refused(tmp_path):
    with pytest.raises(DataError, match="no sample was written"), ShardWriter(tmp_path):
        pass


def test_a_missing_folder_or_index_says_how_to_make_it(fifty, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        ShardIndex.load(tmp_path / "nowhere")
    (fifty.folder / INDEX_FILE).unlink()
    with pytest.raises(DataError, match=f"missing; `samtrain data index {fifty.folder}`"):
        ShardIndex.load(fifty.folder)


def test_a_missing_shard_is_named(fifty):
    (fifty.folder / fifty.shards[1]).unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: this shard is missing"):
        ShardIndex.load(fifty.folder)


def test_a_truncated_shard_is_named_with_both_sizes(fifty):
    path = fifty.folder / fifty.shards[2]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(DataError, match=rf"shard-000002\.tar: {size // 2} bytes, the index says {size}"):
        ShardIndex.load(fifty.folder)


def test_index_files_that_do_not_belong_together_are_refused(fifty):
    path = fifty.folder / SAMPLES_FILE
    path.write_text(path.read_text().replace('"num', '"nun').replace("fifty-0001", "fifty-0002", 1))
    with pytest.raises(DataError, match="digests differ"):
        ShardIndex.load(fifty.folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "shardlist": 5}', "{"])
def test_a_broken_header_is_refused(fifty, content):
    (fifty.folder / INDEX_FILE).write_text(content)
    with pytest.raises(DataError, match=r"index\.json"):
        ShardIndex.load(fifty.folder)


def rewrite_index(folder, *, shards=None, lines=None):
    header = json.loads((folder / INDEX_FILE).read_text())
    samples = (folder / SAMPLES_FILE).read_bytes()
    if lines is not None:
        samples = lines(samples)
        (folder / SAMPLES_FILE).write_bytes(samples)
    if shards is not None:
        shards(header["shardlist"])
    (folder / INDEX_FILE).write_text(json.dumps(index_module.header_of(header["shardlist"], samples)))


def test_a_hostile_index_cannot_leave_its_folder_or_its_shards(fifty):
    rewrite_index(fifty.folder, shards=lambda s: s[0].update(url="../fifty/shard-000000.tar"))
    with pytest.raises(DataError, match="not a file name"):
        ShardIndex.load(fifty.folder)
    build_index(fifty.folder)
    rewrite_index(fifty.folder, lines=lambda b: b.replace(b'"record": [', b'"record": [99', 1))
    with pytest.raises(DataError, match="points outside its shard"):
        ShardIndex.load(fifty.folder)
    build_index(fifty.folder)
    rewrite_index(fifty.folder, lines=lambda b: b.replace(b'"key"', b'"kez"', 1))
    with pytest.raises(DataError, match="not an index of samples"):
        ShardIndex.load(fifty.folder)


def test_a_tar_cut_anywhere_is_refused_when_indexed(write_set):
    folder = write_set("cut", [2, 2])
    path = folder / "shard-000000.tar"
    whole, entries = path.read_bytes(), ShardIndex.load(folder).entries
    end_of_first = entries[0].offset + entries[0].size
    for length in (len(whole) // 3, end_of_first, end_of_first + 100, entries[1].offset + entries[1].size, 300):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="shard-000000"):
            build_index(folder)


def test_a_damaged_header_in_the_middle_of_a_tar_is_refused(write_set):
    folder = write_set("damaged", [2, 2])
    path, entries = folder / "shard-000000.tar", ShardIndex.load(folder).entries
    data = bytearray(path.read_bytes())
    data[entries[1].offset : entries[1].offset + 20] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(DataError, match="no end-of-archive mark"):
        build_index(folder)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../../a.json", record_json("a"))], "not allowed"),
        ([("/abs.json", record_json("abs"))], "not allowed"),
        ([("a.0.jpg", b"x")], "has no member a.json"),
        ([("a.json", b"not json")], "not a sample record"),
        ([("a.json", record_json("b"))], "its record says key 'b'"),
        ([("a.json", record_json("a", ["a.0.jpg"]))], "names image 'a.0.jpg', the tar has json"),
        ([("a.json", record_json("a", ["../../etc/passwd"]))], "names image"),
        ([("a.json", record_json("a")), ("b.json", record_json("b")), ("a.json", record_json("a"))], "used twice"),
        ([("a.json", record_json("a")), ("a.json", record_json("a"))], "two members"),
    ],
)
def test_foreign_tars_that_break_the_layout_are_refused(tmp_path, members, message):
    make_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


def test_links_in_a_tar_are_never_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="not a plain file"):
        build_index(tmp_path)


def test_a_key_in_two_shards_is_refused_with_both_names(tmp_path):
    for name in ("x.tar", "y.tar"):
        make_tar(tmp_path / name, [("a.json", record_json("a"))])
    with pytest.raises(DataError, match=r"y\.tar: a: this key is also in x\.tar"):
        build_index(tmp_path)


def test_a_tar_made_by_tar_itself_is_indexed(tmp_path, make_jpeg):
    data = make_jpeg(7)
    make_tar(tmp_path / "x.tar", [("./a.json", record_json("a", ["a.0.jpg"])), ("./a.0.jpg", data)])
    index = build_index(tmp_path)
    assert index.read_sample(0)[1] == [data]


def test_a_flipped_byte_in_an_image_is_noticed(fifty):
    entry = fifty.entries[3]
    path = fifty.folder / fifty.shards[entry.shard]
    data = bytearray(path.read_bytes())
    data[entry.images[0][0] + entry.images[0][1] // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"fifty-0003\.0\.jpg: sha256 is"):
        ShardIndex.load(fifty.folder).read_sample(3)


def test_many_threads_read_the_same_as_one_and_few_descriptors_stay_open(fifty, monkeypatch):
    monkeypatch.setattr(reading_module, "MAX_OPEN_SHARDS", 2)
    expected = [fifty.read_sample(i) for i in range(50)]
    index, failures = ShardIndex.load(fifty.folder), []

    def read(seed):
        for i in random.Random(seed).sample(range(50), 50):
            if index.read_sample(i) != expected[i]:
                failures.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(index._reader._open) == 2
    index.close()
    assert index.read_sample(7) == expected[7]


def test_the_size_of_an_image_is_read_without_decoding_it(make_jpeg):
    whole = make_jpeg(1, width=300, height=200)
    assert sniff_image(whole[: len(whole) // 2], where="x") == ("jpg", 300, 200)


def test_a_jpeg_of_several_pictures_is_a_jpeg() -> None:
    """Phones write them; PIL calls them MPO."""
    stream = io.BytesIO()
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    first.save(stream, "MPO", save_all=True, append_images=[second])
    assert sniff_image(stream.getvalue(), where="x") == ("jpg", 40, 30)


def test_a_record_or_an_image_of_absurd_size_is_refused_before_it_is_read(write_set, monkeypatch):
    index = ShardIndex.load(write_set("huge", [1, 1]))
    monkeypatch.setattr(index_module, "MAX_IMAGE_BYTES", index.entries[0].images[0][1] - 1)
    with pytest.raises(DataError, match=r"huge-0000\.0\.jpg: \d+ bytes, more than"):
        index.read_sample(0)
    monkeypatch.setattr(index_module, "MAX_RECORD_BYTES", index.entries[0].record[1] - 1)
    for read in (lambda: index.read_record(0), lambda: build_index(index.folder)):
        with pytest.raises(DataError, match=r"huge-0000: its record has .* leave it out"):
            read()
