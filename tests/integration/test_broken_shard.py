"""A shard that is cut on disk in the middle of a real run of two processes."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from samtrain.data.index import ShardIndex


@pytest.mark.timeout(1200)
def test_a_run_goes_on_without_a_shard_that_breaks_and_names_it_once(
    world: Path, write_recipe: Callable[..., Path], start_launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    index = ShardIndex.load(tmp_path / "data" / "train")
    lost = {entry.key for entry in index.entries if entry.shard == 2}
    run = tmp_path / "runs" / "run"
    changes = [f"data.path={tmp_path / 'data'}", "data.max_bad_fraction=0.3", "train.max_steps=14"]
    process = start_launch(write_recipe(save_steps=2), "--local", *changes)
    deadline = time.monotonic() + 500
    while not list(run.glob("checkpoint-*/COMPLETE")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    with open(index.folder / index.shards[2], "r+b") as stream:
        stream.truncate(700)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert (run / "finished.json").exists()  # the set's majority answers were read without it, too
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    named = [line for line in lines if "quarantined" in line]
    assert len(lines) == 14 and len(named) == 1 and list(named[0]["quarantined"]) == ["shard-000002.tar"]
    after = [line for line in lines if line["step"] > named[0]["step"]]
    assert after and not {key for line in after for key in line["keys"]} & lost
    assert set().union(*(line["skipped"] for line in lines)) <= lost
    assert all(key in lost for line in after for key in line["skipped"]) and any(line["skipped"] for line in after)
    assert output.count("is quarantined: ") == 1
