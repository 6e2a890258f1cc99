"""What each public format becomes: texts, images byte for byte, order, splits."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from samtrain.core.errors import ConfigError, DataError
from samtrain.data.convert.dialogue import Turn, exchanges
from samtrain.data.convert.nico import groups
from samtrain.data.convert.report import Report
from samtrain.data.convert.stories import INSTRUCTIONS
from samtrain.data.index import ShardIndex
from samtrain.data.loader import TrainLoader

Run = Callable[..., Report]
Write = Callable[[Path, Any], Path]


def samples(folder: Path) -> list[Any]:
    index = ShardIndex.load(folder)
    return [index.read_sample(i) for i in range(len(index))]


def records(folder: Path) -> list[Any]:
    return [record for record, _ in samples(folder)]


def test_annotations_keep_texts_and_bytes(run: Run, annotations: Path, tmp_path: Path) -> None:
    report = run("annotations", annotations)
    rows = json.loads((annotations / "annotations.json").read_text())
    found = samples(tmp_path / "out" / "train")
    assert report.total.listed == 0 and len(found) == 7
    for number, (row, (record, images)) in enumerate(zip(rows, found)):
        assert (record.key, record.task) == (f"Conceptual-{number:06d}", "Conceptual")
        assert (record.instruction, record.output) == (row["instruction"], row["output"])
        assert images == [(annotations / name).read_bytes() for name in row["img_list"]]
        assert [(one.width, one.height) for one in record.images] == [(48, 40)] * len(images)
        assert record.source == "annotations:annotations.json"


def test_a_folder_of_several_sets_becomes_a_split_each(
    run: Run, annotations: Path, tmp_path: Path, picture: Any, write_json: Write
) -> None:
    other = annotations.parent / "VIST"
    picture(other / "1.jpg", 1)
    write_json(other / "annotations.json", [{"id": 0, "img_list": ["1.jpg"], "instruction": "i", "output": "o"}])
    run("annotations", annotations.parent)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Conceptual", "VIST"]
    assert [record.task for record in records(tmp_path / "out" / "VIST")] == ["VIST"]


def test_markers_become_placeholders_where_asked(run: Run, annotations: Path, tmp_path: Path) -> None:
    run("annotations", annotations, layout="interleaved")
    texts = [record.instruction for record in records(tmp_path / "out" / "train")]
    assert texts[1] == "Sum up. <image>Caption#1:é<image>Caption#2:é"


@pytest.mark.parametrize("as_file", [True, False])
def test_demon_instructions_are_assembled_as_the_benchmark_does(
    run: Run, demon: Path, tmp_path: Path, as_file: bool, demon_instructions: list[str]
) -> None:
    run("demon", demon / "core.json" if as_file else demon.parent)
    found = samples(tmp_path / "out" / "core")  # the split is in the metadata
    assert found[0][0].instruction == (
        demon_instructions[3] + "{image#1}Caption#1:One 0.{image#2}Caption#2:Two.{image#3}Caption#3:"
    )
    assert found[3][0].instruction == (
        demon_instructions[6] + "{image#1}a{table#2}b{image#3}Question: which?"
        "Choice list:['the first', 'it's the second']. Your answer is:"
    )
    assert [(record.output, record.task) for record, _ in found] == [(f"The end {i}.", "AESOP") for i in range(4)]
    assert found[1][1] == [(demon / "images" / f"{i}.jpg").read_bytes() for i in (3, 4, 5)]
    assert found[1][0].meta["row"] == {"sample_id": 1, "task_instruction_id": 4}


def test_demon_interleaved_has_one_placeholder_for_each_image(run: Run, demon: Path, tmp_path: Path) -> None:
    run("demon", demon, layout="interleaved")
    texts = [record.instruction for record in records(tmp_path / "out" / "core")]
    assert texts[0].endswith(".<image>Caption#1:One 0.<image>Caption#2:Two.<image>Caption#3:")
    assert texts[3].count("<image>") == 3 and "#2" not in texts[3]


def test_vist_stories_are_gathered_sorted_and_asked_for_their_end(run: Run, vist: Path, tmp_path: Path) -> None:
    report = run("vist", vist)
    assert {name: count.samples for name, count in report.splits.items()} == {"train": 2, "validation": 1}
    (first, first_images), (second, _) = samples(tmp_path / "out" / "train")
    captions = "".join(f"{{image#{j + 1}}}Caption#{j + 1}:Story 1 goes on, part {j}." for j in range(4))
    assert first.instruction.endswith(f"{captions}{{image#5}}Caption#5:")
    assert first.instruction.removesuffix(f"{captions}{{image#5}}Caption#5:") in INSTRUCTIONS
    assert first.output == "Story 1 goes on, part 4."  # `original_text`, as DEMON's, not the tokenised `text`
    files = [vist / "images" / "train" / f"1{j}00.{['jpg', 'jpg', 'png', 'JPG', 'jpg'][j]}" for j in range(5)]
    assert first_images == [file.read_bytes() for file in files]
    assert first.meta["row"] == {"story_id": "1", "album_id": "72151"}
    assert second.meta["row"]["story_id"] == "2"


def test_stories_take_the_instructions_of_a_demon_file(
    run: Run, vist: Path, demon: Path, tmp_path: Path, write_json: Write, demon_instructions: list[str]
) -> None:
    run("vist", vist, instructions=str(demon / "core.json"))
    texts = [record.instruction for record in records(tmp_path / "out" / "train")]
    assert all(text.split("{image#1}")[0] in demon_instructions for text in texts)
    wrong = write_json(tmp_path / "wrong.json", {"metadata": {}})
    with pytest.raises(ConfigError, match=r"wrong\.json: expected a JSON list of texts, or a DEMON file"):
        run("vist", vist, "other", instructions=str(wrong))


def test_broken_vist_stories_are_listed(run: Run, vist: Path, tmp_path: Path, vist_sentence: Any) -> None:
    path = vist / "sis" / "train.story-in-sequence.json"
    value = json.loads(path.read_text())
    value["annotations"] += [
        vist_sentence(1, 0),  # a sixth
        vist_sentence(4, 0),  # the only one of its story
        [],
        [{"story_id": "5"}],
        *([{**vist_sentence(6, j)[0], "worker_arranged_photo_order": min(j, 3)}] for j in range(5)),
    ]
    (vist / "images" / "train" / "2000.jpg").unlink()
    path.write_text(json.dumps(value))
    run("vist", vist, max_bad_fraction=1)
    listed = json.loads((tmp_path / "out.convert.json").read_text())["listed"]
    assert [(row["where"], row["reason"]) for row in listed] == [
        ("story 2", "image '2000' is not there"),
        ("annotation 10", "story 1 has 5 sentences already, this is one more"),
        ("annotation 12", "is [], expected a list of one object"),
        ("annotation 13", "`original_text` is missing"),
        ("story 6", "`worker_arranged_photo_order` is [0, 1, 2, 3, 3], expected 0...4"),
        ("story 4", "has 1 sentences, expected 5"),
    ]
    assert [record.meta["row"]["story_id"] for record in records(tmp_path / "out" / "train")] == ["1"]


def test_aesop_stories_in_both_splits(run: Run, aesop: Path, tmp_path: Path) -> None:
    report = run("aesop", aesop)
    assert {name: count.samples for name, count in report.splits.items()} == {"train": 2, "test": 1}
    record, images = samples(tmp_path / "out" / "train")[0]
    assert record.instruction.endswith(
        "{image#1}Caption#1:0035 begins.{image#2}Caption#2:It goes on.{image#3}Caption#3:"
    )
    assert record.output == "0035 ends."
    assert images == [(aesop / f"data/images/0035/panel_{j}.png").read_bytes() for j in range(3)]
    assert record.meta["row"] == {
        "storyid": "0035", "theme": ["moral"], "title": "Title 0035", "split": "train", "bg": [3, 3, 3],
        "scenetype": ["Extended-All"] * 3,
    }  # fmt: skip
    run("aesop", aesop / "data" / "test.json", "from_file")  # the pictures are still beside `data`
    assert records(tmp_path / "from_file" / "test") == records(tmp_path / "out" / "test")


def test_ssid_stories_share_pictures(run: Run, ssid: Path, tmp_path: Path) -> None:
    report = run("ssid", ssid)
    assert {name: count.samples for name, count in report.splits.items()} == {"train": 2, "validation": 1, "test": 1}
    (one, images), (two, same) = samples(tmp_path / "out" / "train")
    assert (one.output, two.output) == ("5947: sentence 5.", "5948: sentence 5.")
    assert images == same == [(ssid / "SSID_Images" / f"{2036 + j}.jpg").read_bytes() for j in range(5)]
    assert "Caption#4:5947: sentence 4.{image#5}Caption#5:" in one.instruction


def test_nico_groups_use_every_picture_once_and_mix_contexts(run: Run, nico: Path, tmp_path: Path) -> None:
    run("nico", nico, split="test")
    found = records(tmp_path / "out" / "test")
    used = [name for record in found for name in record.meta["images"]]
    assert sorted(used) == sorted(path.relative_to(nico).as_posix() for path in nico.rglob("*.jpg"))
    bears = [record for record in found if record.meta["row"]["class"] == "bear"]
    assert [len(record.images) for record in bears] == [4, 4, 5]
    assert all(len({name.split("/")[2] for name in record.meta["images"]}) == 3 for record in bears)
    answers = {(record.task, record.output) for record in found}
    assert answers == {
        ("Animal", "Each picture shows a bear."),
        ("Animal", "Each picture shows an elephant."),
        ("Vehicle", "Each picture shows a truck."),
    }


def test_nico_lists_what_is_no_picture_and_groups_the_rest(run: Run, nico: Path, tmp_path: Path) -> None:
    (nico / "Animal" / "bear" / "black" / "0.jpg").write_bytes(b"GIF89a")
    (nico / "Animal" / "bear" / "Thumbs.db").write_bytes(b"x")
    lonely = nico / "Animal" / "cat" / "indoors"
    lonely.mkdir(parents=True)
    (nico / "Animal" / "bear" / "on_snow" / "0.jpg").rename(lonely / "0.jpg")
    (nico / "Animal" / "bear" / "linked").symlink_to(lonely, target_is_directory=True)
    report = run("nico", nico, max_bad_fraction=1)
    listed = json.loads(report.path.read_text())["listed"]
    assert [(row["where"], row["reason"].split(":")[0]) for row in listed] == [
        ("Animal/bear/Thumbs.db", "does not lie in <class>/<context>/"),
        ("Animal/bear/linked", "does not lie in <class>/<context>/"),
        ("Animal/bear/black/0.jpg", "image 'Animal/bear/black/0.jpg'"),
        ("group 6 (Animal/cat)", "Animal/cat/indoors/0.jpg is the only picture of its class"),
    ]
    assert report.total.images == 22 - 2


def test_groups_are_balanced_for_any_counts() -> None:
    draw = random.Random(0)
    for seed in range(200):
        counts = {f"c{i}": draw.randrange(0, 12) for i in range(draw.randrange(1, 6))}
        pictures = {context: [f"{context}/{i}" for i in range(count)] for context, count in counts.items()}
        found = groups(pictures, 5, seed=seed)
        sizes = [len(group) for group in found]
        assert sorted(name for group in found for name in group) == sorted(
            n for names in pictures.values() for n in names
        )
        assert all(size <= 5 for size in sizes) and (not sizes or max(sizes) - min(sizes) <= 1)
        assert groups(pictures, 5, seed=seed) == found
    assert groups({"a": list("abcdefgh")}, 4, seed=0) != groups({"a": list("abcdefgh")}, 4, seed=1)


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_messages_as_a_list_and_as_lines(
    run: Run, chat: Path, tmp_path: Path, name: str, write_json: Write, write_lines: Write
) -> None:
    rows = [
        {
            "messages": [message("user", "<image><image>Which?"), message("assistant", "A.")],
            "images": ["a.jpg", "c.png"],
        },
        {"messages": [message("user", "No picture?"), message("assistant", "None.")]},
        {"messages": [message("user", "And this?"), message("assistant", "B.")], "images": [{"path": "b.jpg"}]},
    ]
    (write_json if name.endswith(".json") else write_lines)(chat / name, rows)
    run("messages", chat / name)
    found = samples(tmp_path / "out" / "train")
    assert [(r.key, r.instruction, r.output) for r, _ in found] == [
        ("chat-000000", "<image><image>Which?", "A."),
        ("chat-000001", "No picture?", "None."),
        ("chat-000002", "And this?", "B."),
    ]
    pictures = [(chat / name).read_bytes() for name in ("a.jpg", "c.png", "b.jpg")]
    assert [images for _, images in found] == [pictures[:2], [], pictures[2:]]


def test_openai_parts_with_images_inside(run: Run, chat: Path, tmp_path: Path, write_lines: Write) -> None:
    import base64

    data = (chat / "a.jpg").read_bytes()
    uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    parts = [
        {"type": "text", "text": "First "},
        {"type": "image_url", "image_url": {"url": uri, "detail": "low"}},
        {"type": "text", "text": " then "},
        {"type": "image", "image": "c.png"},
        {"type": "text", "text": ": same?"},
    ]
    write_lines(chat / "train.jsonl", [{"messages": [message("user", parts), message("assistant", "No.")]}])
    run("messages", chat)
    ((record, images),) = samples(tmp_path / "out" / "train")
    assert record.instruction == "First <image> then <image>: same?"
    assert images == [data, (chat / "c.png").read_bytes()]
    assert record.meta["images"] == [None, "c.png"] and uri[:60] not in record.to_json()


def test_every_answer_of_a_dialogue_becomes_a_sample(run: Run, chat: Path, tmp_path: Path, write_lines: Write) -> None:
    turns = [
        message("system", "Be brief."),
        message("user", "<image>What?"),
        message("assistant", "A fox."),
        message("user", "And <image>?"),
        message("assistant", "A hen.", loss=False),
        message("user", "Sure?"),
        message("assistant", "Yes."),
    ]
    write_lines(chat / "train.jsonl", [{"messages": turns, "images": ["a.jpg", "b.jpg"]}])
    run("messages", chat)
    found = samples(tmp_path / "out" / "train")
    assert [(r.key, r.instruction, r.output, len(images)) for r, images in found] == [
        ("chat-000000-0", "Be brief.\n<image>What?", "A fox.", 1),
        (
            "chat-000000-1",
            "Be brief.\nQuestion: <image>What?\nAnswer: A fox.\nQuestion: And <image>?\nAnswer: A hen.\nSure?",
            "Yes.",
            2,
        ),
    ]


def test_what_messages_cannot_train_on_is_listed(run: Run, chat: Path, tmp_path: Path, write_lines: Write) -> None:
    user, answer = message("user", "q"), message("assistant", "a")
    cases: list[tuple[Any, str]] = [
        ({"messages": [user, answer]}, ""),
        ({"messages": [user, answer], "videos": ["x.mp4"]}, "has `videos`, which cannot be trained on"),
        ({"messages": [user, message("tool", "x"), answer]}, "has a message of role 'tool'"),
        ({"messages": [message("assistant", "a")]}, "its turns are assistant; expected user, assistant"),
        ({"messages": [user, answer, user]}, "its turns are user, assistant, user; expected"),
        ({"messages": []}, "its turns are none"),
        ({"messages": [user, message("assistant", "<image>")], "images": ["a.jpg"]}, "an answer holds <image>"),
        ({"messages": [user, message("assistant", None)]}, "`content` is missing"),
        ({"messages": [user, message("assistant", "a", tool_calls=[{}])]}, "has a message with tool_calls"),
        ({"messages": [user, message("assistant", "a", loss=False)]}, "has no answer to be learnt"),
        ({"messages": [message("user", "<video>"), answer]}, "holds <video>"),
        ({"messages": [message("user", "<image><image>"), answer], "images": ["a.jpg"]}, "has 2 <image> placeholders"),
        ({"messages": [user, answer], "images": ["https://example.org/x.jpg"]}, "is a URL; nothing is fetched"),
        ({"messages": [user, answer], "images": ["data:image/png;base64,%%%%"]}, "not base64"),
        ({"messages": [message("user", [{"type": "input_audio"}]), answer]}, "has a part of type 'input_audio'"),
        ({"messages": "hello"}, "`messages` is 'hello', expected a list of dict"),
        (["not an object"], "is ['not an object'], expected an object"),
        ({"messages": [user, message("assistant", "  ")]}, "its answer is empty"),
    ]  # fmt: skip
    write_lines(chat / "train.jsonl", [row for row, _ in cases])
    with open(chat / "train.jsonl", "a") as stream:
        stream.write('{"messages": [\n')
    report = run("messages", chat, max_bad_fraction=1)
    reasons = [row["reason"] for row in json.loads(report.path.read_text())["listed"]]
    for reason, (_, expected) in zip(reasons, cases[1:]):
        assert expected in reason
    assert len(reasons) == len(cases) and reasons[-1].startswith("not valid JSON")
    assert (report.total.records, report.total.converted, report.total.listed) == (19, 1, 18)


def test_llava_conversations(run: Run, chat: Path, tmp_path: Path, write_json: Write) -> None:
    def row(identity: Any, image: Any, *values: str) -> dict[str, Any]:
        turns = [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]
        return {"id": identity, "conversations": turns} | ({} if image is None else {"image": image})

    rows = [
        row("000000033471", "a.jpg", "<image>\nWhat colour?", "Red.", "And the sky?", "Blue."),
        row(
            "000000033471", ["a.jpg", "c.png"], "<image> <image>\nCompare.", "Alike."
        ),  # ids repeat in LLaVA's own sets
        row(7, None, "Hello?", "Hello."),
        row(8, ["a.jpg"], "<image> <image>\nCompare.", "Alike."),
    ]
    write_json(chat / "llava_mix.json", rows)
    report = run("llava", chat / "llava_mix.json", max_bad_fraction=0.5)
    found = samples(tmp_path / "out" / "train")
    assert [(r.key, r.instruction, r.output, len(images)) for r, images in found] == [
        ("llava_mix-000000-0", "<image>\nWhat colour?", "Red.", 1),
        ("llava_mix-000000-1", "Question: <image>\nWhat colour?\nAnswer: Red.\nAnd the sky?", "Blue.", 1),
        ("llava_mix-000001", "<image> <image>\nCompare.", "Alike.", 2),
        ("llava_mix-000002", "Hello?", "Hello.", 0),
    ]
    assert report.first == ["train: record 3: has 2 <image> placeholders but 1 images"]


def test_a_dialogue_is_converted_whole_or_listed(run: Run, chat: Path, tmp_path: Path, write_lines: Write) -> None:
    def row(*texts: str, images: list[str]) -> dict[str, Any]:
        return {
            "messages": [message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)],
            "images": images,
        }

    rows = [
        row("<image>q", "a", "r", " ", images=["a.jpg"]),
        row("<image>q", "a", "<image>r", "b", images=["a.jpg", "gone.jpg"]),
        row("<image>q", "a", "r", "b", images=["a.jpg"]),
    ]
    write_lines(chat / "train.jsonl", rows)
    report = run("messages", chat, max_bad_fraction=0.7)
    assert report.first == ["train: record 0: its answer is empty", "train: record 1: image 'gone.jpg' is not there"]
    assert [record.key for record in records(tmp_path / "out" / "train")] == ["chat-000002-0", "chat-000002-1"]


def test_dialogues_without_placeholders_show_all_images_or_gain_some() -> None:
    turns = [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "b")]
    assert [(e.instruction, e.num_images) for e in exchanges(turns, 2, layout="prefix")] == [
        ("q", 2),
        ("Question: q\nAnswer: a\nr", 2),
    ]
    assert [(e.instruction, e.num_images) for e in exchanges(turns, 2, layout="interleaved")] == [
        ("<image><image>q", 2),
        ("Question: <image><image>q\nAnswer: a\nr", 2),
    ]
    with pytest.raises(DataError, match="has 1 <image> placeholders but 2 images"):
        exchanges([Turn("user", "<image>q"), Turn("assistant", "a")], 2, layout="prefix")


@pytest.mark.parametrize("name", ["annotations", "demon", "vist", "aesop", "ssid", "nico"])
def test_converted_shards_train_and_other_tools_read_them(
    run: Run, name: str, tmp_path: Path, request: pytest.FixtureRequest, encoder: Any, options: Any
) -> None:
    run(name, request.getfixturevalue(name), layout="interleaved")
    folder = next(path for path in (tmp_path / "out").iterdir())
    index = ShardIndex.load(folder)
    options = options.model_copy(update={"max_tokens": 4000, "max_images": 40})
    with TrainLoader(index, encoder, options, global_batch_size=1, seed=0, rank=0, world_size=1) as loader:
        keys = [batch.keys for _ in range(len(index)) for batch in next(loader).micro_batches]
    assert sorted(key for of_batch in keys for key in of_batch) == sorted(entry.key for entry in index.entries)
    urls = [str(folder / shard) for shard in index.shards]
    for i, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        record, images = index.read_sample(i)
        assert sample["__key__"] == record.key
        assert [sample[f"{n}.{one.file.rsplit('.')[-1]}"] for n, one in enumerate(record.images)] == images


@pytest.mark.parametrize("name", ["annotations", "demon", "vist", "aesop", "ssid", "nico"])
def test_the_same_input_gives_the_same_bytes_and_the_same_report(
    run: Run, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(name)

    def everything(output: str) -> dict[str, bytes]:
        run(name, source, output)
        files = {p.relative_to(tmp_path / output).as_posix(): p for p in (tmp_path / output).rglob("*") if p.is_file()}
        files["report"] = tmp_path / f"{output}.convert.json"
        return {name: path.read_bytes() for name, path in files.items()}

    assert everything("one") == everything("two")


def test_another_seed_asks_otherwise(run: Run, nico: Path, tmp_path: Path) -> None:
    run("nico", nico, "zero")
    run("nico", nico, "one", seed=1)
    texts = [[r.instruction for r in records(tmp_path / name / "train")] for name in ("zero", "one")]
    assert texts[0] != texts[1]


def test_pictures_are_stored_as_they_were(run: Run, annotations: Path, tmp_path: Path) -> None:
    """Not decoded, not encoded anew: bytes that no encoder would write again come through."""
    path = annotations / "images" / "0" / "0.jpg"
    data = path.read_bytes() + b"trailing bytes that a decoder ignores"
    path.write_bytes(data)
    run("annotations", annotations)
    _, images = samples(tmp_path / "out" / "train")[0]
    assert images == [data]
    assert io.BytesIO(images[0]).read().endswith(b"ignores")
