import io
import random

import pytest
from PIL import Image, ImageChops

from samtrain.core.errors import DataError
from samtrain.core.sample import SampleRecord
from samtrain.data.index import ShardIndex
from samtrain.data.shards import ShardWriter
from samtrain.data.sheet import ShownSample, draw_samples, font, wrap
from samtrain.data.show import choose_keys, choose_random, load_indexes


def sample(images, instruction="What is shared?", output="A fox.", **changes):
    return ShownSample(
        SampleRecord("key-1", "task", instruction, output, ()), images, "train/shard-000000.tar", **changes
    )


def flat(colour, size=(30, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def places_of(sheet, colour):
    """The box around all pixels of a colour."""
    difference = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L")
    return difference.point(lambda value: 255 if value == 0 else 0).getbbox()


def test_images_stand_in_their_order_and_shape():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (9, 90, 9)]
    sheet = draw_samples([sample([flat(c, (60, 30)) for c in colours])])
    boxes = [places_of(sheet, colour) for colour in colours]
    corners = [(top, left) for left, top, _, _ in boxes]
    assert corners[:5] == sorted(corners[:5]) and corners[5:] == sorted(corners[5:])
    assert corners[5][0] > boxes[0][3]  # the sixth begins a new row
    for left, top, right, bottom in boxes:
        assert (right - left) / (bottom - top) == pytest.approx(2, rel=0.05)  # wide pictures stay wide


def test_a_broken_picture_is_drawn_as_its_error_and_the_others_as_they_are():
    sheet = draw_samples([sample([flat((255, 0, 0)), b"garbage", flat((0, 0, 255))])])
    assert places_of(sheet, (255, 0, 0)) and places_of(sheet, (0, 0, 255)) and places_of(sheet, (0xB0, 0, 0x20))


def test_texts_are_whole_and_no_line_is_too_wide():
    draw = random.Random(0)
    for width in (600, 940):
        text = " ".join("w" * draw.randrange(1, 60) for _ in range(25)) + " " + "W" * 200
        lines = wrap(text, width)
        assert all(font().getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_text_without_end_is_told_not_drawn():
    lines = wrap("endless " * 100_000, 500)
    assert len(lines) < 40 and lines[-1].endswith("characters more)")
    sheet = draw_samples([sample([flat("red")], instruction="x\n" * 50_000)])
    assert sheet.height < 1500


def test_letters_the_font_lacks_are_written_as_code_points():
    assert wrap("é ж 中", 500) == ["é ж \\u4e2d"]


def test_many_images_and_no_image_are_drawn():
    assert draw_samples([sample([flat("red")] * 80)]).height < 50 * 210
    assert draw_samples([sample([])]).height > 40
    assert draw_samples([]).height == 1


def test_boxes_are_outlined_where_they_are():
    sheet = draw_samples([sample([flat((0, 0, 255), (100, 100))], boxes=[[(20, 40, 60, 80)]])])
    left, top, right, bottom = places_of(sheet, (255, 0, 0))
    picture = places_of(sheet, (0, 0, 255))
    scale = 1.9
    assert left - picture[0] == pytest.approx(20 * scale, abs=2) and bottom - top == pytest.approx(40 * scale, abs=3)
    assert right - left == pytest.approx(40 * scale, abs=3)


# The command.


@pytest.fixture
def two_splits(tmp_path, make_jpeg):
    for split, count in (("train", 12), ("test", 5)):
        with ShardWriter(tmp_path / "set" / split) as writer:
            for i in range(count):
                texts = {"instruction": "<image> or <image>?", "output": "both"}
                writer.write(key=f"{split}-{i}", task="t", images=[make_jpeg(i), make_jpeg(i + 50)], **texts)
    return tmp_path / "set"


def test_samples_are_found_by_key_in_any_split(two_splits, tmp_path, run_cli):
    output = tmp_path / "deep" / "one.png"
    code, out, _ = run_cli("show", two_splits, "--key", "test-3", "--key", "train-7", "-o", output)
    assert code == 0 and f"wrote {output}: test-3, train-7" in out
    assert Image.open(output).format == "PNG"


def test_random_samples_depend_on_the_seed_alone_and_come_from_all_splits(two_splits):
    def keys(count, seed):
        return [index.entries[i].key for index, i in choose_random(load_indexes(two_splits), count, seed=seed)]

    assert keys(6, 1) == keys(6, 1) != keys(6, 2)
    assert len(set(keys(17, 3))) == 17 and sorted(keys(50, 0)) == sorted(keys(17, 0))
    assert {key.partition("-")[0] for key in keys(17, 0)} == {"train", "test"}


def test_wrong_use_is_refused_with_2(two_splits, tmp_path, run_cli):
    (tmp_path / "file").write_text("")
    for arguments, text in (
        ((two_splits,), "give either"),
        ((two_splits, "--random", "2", "--key", "test-1"), "give either"),
        ((two_splits, "--key", "test-33"), "the nearest are test-3"),
        ((two_splits, "--random", "0"), "1 to 200"),
        ((two_splits, "--random", "1", "-o", tmp_path / "file" / "x.png"), "cannot be written"),
        ((tmp_path / "nowhere", "--random", "1"), "no such folder"),
    ):
        code, _, err = run_cli("show", *arguments)
        assert code == 2 and text in err


def test_damaged_samples_are_shown_as_far_as_they_can_be(two_splits, tmp_path, run_cli):
    index = ShardIndex.load(two_splits / "train")
    with open(index.folder / index.shards[0], "r+b") as stream:
        stream.truncate(index.entries[6].record[0])
    code, out, _ = run_cli("show", two_splits, "--random", "17", "-o", tmp_path / "x.png")
    assert code == 0 and "train-11" in out
    with pytest.raises(DataError, match="the nearest are"):
        choose_keys(load_indexes(two_splits), ["nothing"])
