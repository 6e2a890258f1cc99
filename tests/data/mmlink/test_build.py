"""The whole build on small real sources: what comes out, restarts, determinism, bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from samtrain.core.errors import DataError, SamtrainError
from samtrain.data.index import ShardIndex
from samtrain.data.loader import TrainLoader
from samtrain.data.mmlink.build import build_mmlink
from samtrain.data.mmlink.command import summary
from samtrain.data.mmlink.language.chat import BudgetExhausted
from samtrain.data.mmlink.options import parse_config
from samtrain.data.mmlink.store import Store

Built = tuple[Path, dict[str, Any], dict[str, Any]]


def build(values: dict[str, Any]) -> dict[str, Any]:
    return build_mmlink(parse_config(values, source="test"))


def digests(report: dict[str, Any]) -> dict[str, str]:
    return {split: row["digest"] for split, row in report["splits"].items()}


def samples(folder: Path) -> list[tuple[Any, list[bytes]]]:
    index = ShardIndex.load(folder)
    return [index.read_sample(i) for i in range(len(index))]


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(folder, values, report) of one build, for tests that only look."""
    root = tmp_path_factory.mktemp("built")
    values = {
        "output": str(root / "set"),
        "num_samples": 40,
        "splits": {"train": 0.7, "validation": 0.0, "test": 0.3},
        "sources": [
            {"kind": "folder", "path": str(sources / "things"), "category": "shape"},
            {"kind": "folder", "path": str(sources / "icons"), "role": "icon"},
            {"kind": "folder", "path": str(sources / "photographs"), "role": "background"},
            {"kind": "folder", "path": str(sources / "covers"), "role": "cover", "licence": "CC0-1.0"},
        ],
        "segment": {"kind": "grabcut", "min_agreement": 0.7},
        "plates": {"remove": False},
        "compose": {"canvas": 96, "grid": [2, 2]},
        "filters": {"pose_bits": None},
        "execution": {"backend": "local"},
    }
    return root / "set", values, build(values)


def test_samples_are_what_their_records_say(built: Built) -> None:
    folder, _, report = built
    found = [(split, *sample) for split in ("train", "test") for sample in samples(folder / split)]
    assert len(found) == 40 and report["filters"]["kept"] == 40
    tasks = Counter(record.task for _, record, _ in found)
    assert tasks == {"mmlink_object": 28, "mmlink_icon": 6, "mmlink_cover": 6}
    for split, record, images in found:
        meta = record.meta
        assert meta["split"] == split and record.key.startswith(f"{split}-{meta['domain']}-")
        assert len(images) == len(record.images) == len(meta["pictures"]) == 2
        if meta["domain"] == "covers":
            continue
        for picture, data in zip(meta["pictures"], images):
            assert Image.open(io.BytesIO(data)).size == (96, 96)
            assert picture["objects"][picture["target"]]["identity"] == meta["identity"]
        shared = set.intersection(*({row["identity"] for row in picture["objects"]} for picture in meta["pictures"]))
        assert shared == {meta["identity"]}
        name = meta["pictures"][0]["objects"][meta["pictures"][0]["target"]]["name"].split()[-1]
        assert name in record.output.lower()


def test_masks_travel_with_the_shards_and_boxes_are_around_them(
    built: Built,
) -> None:
    import tarfile

    folder, _, _ = built
    seen = 0
    with tarfile.open(next((folder / "train").glob("*.tar"))) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name, data in content.items():
        if name.endswith(".json") and json.loads(data)["meta"]["domain"] == "objects":
            record = json.loads(data)
            for i, picture in enumerate(record["meta"]["pictures"]):
                mask = np.asarray(Image.open(io.BytesIO(content[f"{record['key']}.{i}.mask.png"])))
                for row in picture["objects"]:
                    ys, xs = np.nonzero(mask == row["value"])
                    assert row["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                    seen += 1
    assert seen > 40


def test_no_identity_is_in_two_splits(built: Built) -> None:
    folder, _, _ = built
    seen = {
        split: {
            row["identity"]
            for record, _ in samples(folder / split)
            for p in record.meta["pictures"]
            for row in p["objects"]
        }
        for split in ("train", "test")
    }
    assert all(seen.values()) and not seen["train"] & seen["test"]


def test_report_attribution_and_sheets(built: Built) -> None:
    folder, _, report = built
    assert json.loads((folder / "build_report.json").read_text()) | {"reused": False} == report
    stages = report["stages"]
    assert list(stages) == ["read", "segment", "plates", "caption", "compose", "describe", "fill", "write"]
    assert all(row["jobs"] == row["found"] + row["done"] + row["rejected"] + row["failed"] for row in stages.values())
    assert stages["read"]["rejected"] == 1  # the damaged picture
    assert any("cannot be decoded" in reason for reason in report["segmentation"]["not_used"])
    assert report["segmentation"]["mean_iou"] > 0.85
    planned, filters = report["filters"]["planned"], report["filters"]
    assert planned == filters["kept"] + sum(filters["not_kept"].values())
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == planned - filters["kept"]
    pictures = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    used = {row["picture"] for row in pictures}
    shown = {
        row["picture"] for split in ("train", "test") for record, _ in samples(folder / split)
        for picture in record.meta["pictures"] for row in (*picture["objects"], {"picture": picture["plate"]})
    } - {""}  # fmt: skip
    assert used == shown
    credits = json.loads((folder / "attribution.json").read_text())
    assert {row["title"] for row in credits} >= {"things", "icons", "photographs", "covers"}
    assert "CC0-1.0" in (folder / "ATTRIBUTION.md").read_text()
    for name in ("contact_sheet.png", "stages.png"):
        with Image.open(folder / name) as image:
            assert image.width > 300 and image.height > 300


def test_a_finished_set_is_found_and_another_configuration_is_refused(
    built: Built,
) -> None:
    _, values, report = built
    found = build(values | {"execution": {"backend": "local", "num_cpus": 1}})
    assert found["reused"] and digests(found) == digests(report)
    assert "nothing was to be done" in summary(found) and "nothing was to be done" not in summary(report)
    with pytest.raises(DataError, match=r"another configuration \(different: seed\)"):
        build(values | {"seed": 9})


def test_shards_feed_the_loader(built: Built, make_loader: Any) -> None:
    folder, _, _ = built
    keys = make_loader(ShardIndex.load(folder / "train"))
    assert sorted(keys) == sorted(record.key for record, _ in samples(folder / "train"))


@pytest.fixture
def make_loader(encoder: Any, options: Any) -> Any:
    """Keys of one epoch as the training loader gives them."""

    def run(index: ShardIndex) -> list[str]:
        wide = options.model_copy(update={"max_tokens": 400, "max_images": 16, "image_size": 32})
        with TrainLoader(index, encoder, wide, global_batch_size=len(index), seed=1, rank=0, world_size=1) as loader:
            step = next(loader)
        assert all(batch.pixel_values.shape[1:] == (3, 32, 32) for batch in step.micro_batches)
        return [key for batch in step.micro_batches for key in batch.keys]

    return run


def test_the_same_seed_gives_the_same_bytes_whatever_the_batches(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"num_samples": 10}
    first = build(values)
    small = {name: {"batch_size": 3} for name in ("read", "segment", "compose", "fill", "write")}
    changed = {
        "output": str(tmp_path / "b"),
        "work": str(tmp_path / "wb"),
        "execution": {"backend": "local", "stages": small},
    }
    assert digests(build(values | changed)) == digests(first)
    changed = {"output": str(tmp_path / "c"), "work": str(tmp_path / "wc"), "seed": 1}
    assert digests(build(values | changed)) != digests(first)


def test_ray_goes_on_where_one_process_stopped_and_ends_with_the_same_set(
    values: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("ray.data")
    local = build(values)
    work = tmp_path / "ray.work"
    shutil.copytree(values["work"], work)
    for stage in ("segment", "fill"):
        shutil.rmtree(work / stage)
    stages = {"segment": {"batch_size": 8, "workers": 2}, "fill": {"batch_size": 4, "workers": 2}}
    execution = {"backend": "ray", "num_cpus": 2, "stages": stages}
    ray = build(values | {"output": str(tmp_path / "ray"), "work": str(work), "execution": execution})
    assert digests(ray) == digests(local)
    assert ray["execution"]["cluster_cpus"] == 2
    for stage, row in ray["stages"].items():
        again = stage in ("segment", "fill")
        assert row["done"] == (row["jobs"] if again else 0), stage
        assert row["jobs"] == local["stages"][stage]["jobs"]


def test_only_what_depends_on_a_change_is_made_again(values: dict[str, Any], tmp_path: Path) -> None:
    build(values)
    again = build(values | {"output": str(tmp_path / "again")})
    assert all(row["found"] == row["jobs"] and row["work_seconds"] >= 0 for row in again["stages"].values())
    assert again["stages"]["fill"]["cpu_seconds"] > 0  # what the build before took
    other = build(values | {"output": str(tmp_path / "other"), "fill": {"kind": "photographs"}})
    redone = {name for name, row in other["stages"].items() if row["done"]}
    assert redone == {"fill"}
    kept = other["stages"]["fill"]
    assert kept["found"] > 0  # icons and covers do not depend on how things are pasted


def test_kill_9_costs_only_what_was_under_way(values: dict[str, Any], tmp_path: Path) -> None:
    """A build in its own process is killed while it fills; the next one finds everything before, and ends alike."""
    values["execution"]["stages"] = {"fill": {"batch_size": 1}}
    reference = build(values | {"output": str(tmp_path / "whole"), "work": str(tmp_path / "whole.work")})
    config = tmp_path / "build.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "samtrain.cli", "data", "build-mmlink", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    fill = Path(values["work"]) / "fill"
    deadline = time.monotonic() + 120
    while len(list(fill.glob("*.zip")) if fill.is_dir() else []) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1].decode()[-2000:]
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not Path(values["output"]).exists()
    done = len(Store(Path(values["work"])).scan("fill"))
    report = build(values)
    stages = report["stages"]
    assert 5 <= done < stages["fill"]["jobs"]
    assert stages["fill"]["found"] == done and stages["fill"]["done"] == stages["fill"]["jobs"] - done
    assert all(stages[name]["done"] == 0 for name in ("read", "segment", "plates", "caption", "compose", "describe"))
    assert digests(report) == digests(reference)


def test_a_damaged_segment_is_made_again(values: dict[str, Any], tmp_path: Path) -> None:
    first = build(values)
    segment = sorted((Path(values["work"]) / "compose").glob("*.zip"))[0]
    segment.write_bytes(segment.read_bytes()[:100])
    again = build(values | {"output": str(tmp_path / "again")})
    assert again["stages"]["compose"]["done"] > 0 and again["stages"]["read"]["done"] == 0
    assert digests(again) == digests(first)


def test_a_changed_source_is_read_again_alone(
    values: dict[str, Any], sources: Path, tmp_path: Path, thing: Any
) -> None:
    own = tmp_path / "own"
    shutil.copytree(sources / "things", own)
    values["sources"][0] = {"kind": "folder", "path": str(own)}
    build(values)
    thing(7, 5).save(own / "cube" / "1.png")
    os.utime(own / "cube" / "1.png", (1, 1))
    again = build(values | {"output": str(tmp_path / "again")})
    assert again["stages"]["read"]["done"] == 1 and again["stages"]["segment"]["done"] == 1


def test_two_builds_do_not_share_a_work_folder(values: dict[str, Any]) -> None:
    import fcntl

    work = Path(values["work"])
    work.mkdir()
    with open(work / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another build is using this work folder"):
            build(values)


def test_no_photograph_for_a_way_that_needs_one_is_told(values: dict[str, Any]) -> None:
    del values["sources"][2]
    with pytest.raises(DataError, match=r"fill\.kind = 'telea' puts things on photographs, and no source has one"):
        build(values)


def test_a_full_disk_or_failing_read_stops_with_what_is_done_kept(
    values: dict[str, Any], sources: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(sources / "things", own)
    values["sources"][0] = {"kind": "folder", "path": str(own)}
    config = parse_config(values, source="test")
    seen: list[str] = []

    def vanish(what: str, done: int, total: int) -> None:
        if not seen:  # after listing, before the first batch
            (own / "cube" / "0.png").unlink()
            seen.append(what)

    with pytest.raises(SamtrainError, match=r"stage read: 1 of \d+ items failed.*build again") as caught:
        build_mmlink(config, progress=vanish)
    assert "0.png" in str(caught.value)
    assert not Path(values["output"]).exists()


def test_a_language_model_writes_within_its_budget_and_goes_on_when_it_is_raised(
    values: dict[str, Any], chat: Any, tmp_path: Path
) -> None:
    values["sources"] = values["sources"][:3]
    values |= {
        "num_samples": 8,
        "domains": {"objects": 1.0, "icons": 0.0, "covers": 0.0},
        "splits": {"train": 1.0, "validation": 0.0, "test": 0.0},
    }

    def reply(request: dict[str, Any]) -> Any:
        asked = request["messages"][-1]["content"]
        if "background" in asked:
            return chat.says("grey rocks")(request)
        name = asked.split("All of them show ")[1].split(";")[0]
        return chat.says(json.dumps({"instruction": "What do they share?", "answer": f"They share {name}."}))(request)

    chat.otherwise = reply
    writer = {"kind": "openai", "base_url": chat.base_url, "model": "tiny", "api_key_env": "MMLINK_TEST_KEY"}
    chat.script = [chat.returns(500), chat.returns(429, Retry_After="0")]
    with pytest.raises(BudgetExhausted, match="budget_requests = 25 is used up"):
        build(values | {"writer": writer | {"budget_requests": 25, "backoff_seconds": 0.01}})
    assert len(chat.requests) == 25
    report = build(values | {"writer": writer | {"budget_requests": 200, "backoff_seconds": 0.01}})
    jobs = 2 * report["stages"]["describe"]["jobs"] + report["stages"]["write"]["jobs"]
    assert len(chat.requests) == jobs + 2  # every answer asked for once, but for the two that were no answers
    assert report["stages"]["write"]["usage"]["spent"]["requests"] == jobs + 2
    for record, _ in samples(Path(values["output"]) / "train"):
        assert record.output.startswith("They share a ")
        assert {picture["background"] for picture in record.meta["pictures"]} == {"grey rocks"}
    text = (Path(values["output"]) / "build_report.json").read_text()
    assert "secret-key" not in text


def test_a_missing_key_is_found_before_anything_is_done(values: dict[str, Any]) -> None:
    from samtrain.core.errors import ConfigError

    writer = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_VARIABLE"}
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        build(values | {"writer": writer})
    assert not Path(values["work"]).exists()


def test_the_command_ends_with_2_and_one_line_for_a_wrong_configuration(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(values | {"num_smaples": 3}))
    command = [sys.executable, "-m", "samtrain.cli", "data", "build-mmlink", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown key `num_smaples`; did you mean `num_samples`?" in done.stderr and "Traceback" not in done.stderr
