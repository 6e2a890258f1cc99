"""The data benchmark: what it counts, what it refuses, and one quick run of it as it is called."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.data import corpus as corpora
from benchmarks.data import figure, machine, measure, packing, report
from benchmarks.data.child import Job, _keep, _rates
from benchmarks.data.gate import Gate, Verdict
from benchmarks.data.loaders import Batch, LoaderOptions, OurLoader, WebdatasetLoader, from_columns
from benchmarks.data.rows import REPRESENTATIVES, ROWS
from samtrain.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SMALL = corpora.CorpusOptions(num_samples=16, min_pixels=110_000, max_pixels=150_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> corpora.Corpus:
    return corpora.build(tmp_path_factory.mktemp("work"), SMALL)


def bench(corpus: corpora.Corpus) -> measure.Bench:
    return measure.Bench(corpus, sorted(os.sched_getaffinity(0))[:1], 4, None, print)


def test_the_set_is_as_its_options_say_and_is_used_again(corpus: corpora.Corpus, tmp_path: Path) -> None:
    index = corpus.index
    assert len(index) == 16 and {entry.num_images for entry in index.entries} == {3, 4, 5}
    record, _ = index.read_sample(0)
    assert all(100_000 < image.width * image.height < 160_000 for image in record.images)
    assert 1 < corpus.facts["bits_per_pixel"] < 4
    assert corpora.build(tmp_path, SMALL).index.digest == index.digest, "another machine makes the same set"
    kept = corpora.build(corpus.folder.parent, SMALL)
    assert kept.folder == corpus.folder and kept.facts == corpus.facts
    assert (
        corpora.build(tmp_path, corpora.CorpusOptions(num_samples=16, seed=1, min_pixels=9000, max_pixels=9999)) != kept
    )


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no JPEG or PNG of at least 256 x 256 there"):
        corpora.build(tmp_path / "work", corpora.CorpusOptions(photos=str(tmp_path)))


def judged(gate: Gate, batches: list[Batch], folder: Path) -> Verdict:
    """The verdict on an epoch, as a child of the benchmark hands it over."""
    pixels: dict[str, Any] = {}
    for batch in batches:
        _keep(pixels, batch, gate.check_keys)
    np.savez(folder / "seen.npz", **pixels)
    found = {"keys": [k for b in batches for k in b.keys], "counts": [c for b in batches for c in b.counts]}
    return gate.judge(found, folder / "seen.npz")


@pytest.mark.parametrize("square", ["full", "reduced"])
def test_our_loader_gives_each_key_once_and_these_pictures(corpus: corpora.Corpus, tmp_path: Path, square: str) -> None:
    gate = Gate(corpus, num_checked=4)
    loader = OurLoader(LoaderOptions(corpus.folder, 1, 4, square))
    verdict = judged(gate, list(loader.epoch()), tmp_path)
    loader.close()
    assert verdict.is_ok
    assert verdict.difference is not None and verdict.difference < 0.5  # too small to be reduced: the same either way


@pytest.mark.parametrize(("square", "is_ok"), [("pil", True), ("cv2", True), ("ours", True), ("cv2_linear", False)])
def test_other_decoders_are_held_to_the_same_pictures(
    corpus: corpora.Corpus, tmp_path: Path, square: str, is_ok: bool
) -> None:
    """At full size, where INTER_LINEAR skips pixels."""
    large = corpora.build(
        corpus.folder.parent, corpora.CorpusOptions(num_samples=2, min_pixels=700_000, max_pixels=800_000)
    )
    samples = [corpora.sample_fields(large.index, i) for i in range(2)]
    verdict = judged(Gate(large, num_checked=2), [from_columns(s, square=square) for s in samples], tmp_path)
    assert verdict.is_ok == is_ok, verdict
    assert is_ok or "pixels differ by" in verdict.why


def test_an_epoch_that_is_not_the_set_is_refused(corpus: corpora.Corpus) -> None:
    gate = Gate(corpus, num_checked=1)
    keys, counts = list(gate.counts), list(gate.counts.values())
    assert gate.wrong_keys(keys, counts) == ""
    assert gate.wrong_keys(keys[1:], counts[1:]) == "of 16 samples 1 missing, 0 repeated, 0 unknown"
    assert gate.wrong_keys([*keys, keys[0]], [*counts, counts[0]]) == "of 16 samples 0 missing, 1 repeated, 0 unknown"
    assert gate.wrong_keys([*keys[1:], "x"], counts) == "of 16 samples 1 missing, 0 repeated, 1 unknown"
    assert gate.wrong_keys(keys, [counts[0] + 1, *counts[1:]]) == "1 samples with a wrong number of images"
    assert gate.judge({"keys": keys[1:], "counts": counts[1:]}, corpus.folder / "not read").why.startswith("of 16")


def test_webdataset_skips_as_many_samples_as_were_seen(corpus: corpora.Corpus) -> None:
    loader = WebdatasetLoader(LoaderOptions(corpus.folder, 1, 4, "ours"))
    whole = [key for batch in loader.epoch() for key in batch.keys]
    rest = [key for batch in loader.epoch(skip=8) for key in batch.keys]
    assert sorted(whole) == sorted(Gate(corpus, num_checked=1).counts) and rest == whole[8:]


def test_ours_resumes_where_its_state_was_taken(corpus: corpora.Corpus) -> None:
    options = LoaderOptions(corpus.folder, 1, 4, "reduced")
    first, second = OurLoader(options), OurLoader(options)
    keys = [batch.keys for batch in first.epoch()]
    second.load_state(json.loads(json.dumps(first.state(8))))
    assert [batch.keys for batch in second.epoch()] == keys[2:]
    first.close()
    second.close()


def test_a_rate_leaves_out_the_start() -> None:
    # 10 images each; the first batch comes after 100 s, the others each second.
    rates = _rates([100.0, 101.0, 102.0, 103.0], [50.0, 51.0, 52.0, 53.0], [10, 10, 10, 10])
    assert rates == {"images_per_second": 10.0, "cpu_ms_per_image": 100.0}
    assert _rates([1.0], [1.0], [10]) == {}


def test_a_child_that_fails_says_why(corpus: corpora.Corpus) -> None:
    job = Job("rate", "ours", "full", str(corpus.folder / "missing"), 1, 4, [0])
    with pytest.raises(measure.ChildFailedError, match=r"rate of ours: exit code 1: .*no such folder of shards"):
        measure.run_jobs([job])


def test_a_row_whose_package_is_missing_is_absent_with_a_reason(
    corpus: corpora.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS["streaming_cv2"]
    changed = row.__class__(row.label, "peer", "streaming", "cv2", ("no_such_package_here",))
    result = measure.check(bench(corpus), changed, Gate(corpus, num_checked=1))
    assert result["match"] == "absent" and "no_such_package_here not installed" in result["why"]


def sizes(seed: int, count: int) -> packing.Lengths:
    draw = random.Random(seed)
    chosen = [packing.SampleSize(f"s{i}", draw.randint(40, 700), draw.randint(1, 10)) for i in range(count)]
    return packing.Lengths("drawn", chosen, [draw.randint(1, 40) for _ in chosen])


def test_every_method_keeps_budgets_and_gives_all_ranks_as_many_rounds() -> None:
    lengths = sizes(0, 64)
    for method in packing.METHODS.values():
        for world_size in (1, 2, 8):
            hands = method(lengths.sizes, world_size)
            assert len({len(hand) for hand in hands}) == 1 and len(hands) == world_size
            assert sorted(i for hand in hands for p in hand for i in p or ()) == list(range(64))
            for p in (p for hand in hands for p in hand if p):
                assert sum(lengths.sizes[i].num_tokens for i in p) <= packing.MAX_TOKENS
                assert sum(lengths.sizes[i].num_images for i in p) <= packing.MAX_IMAGES


def test_occupancy_and_waiting_are_what_they_say() -> None:
    """Two samples on two ranks: 100 and 300 tokens, no images, 10 and 30 labels."""
    lengths = packing.Lengths("two", [packing.SampleSize("a", 100, 0), packing.SampleSize("b", 300, 0)], [10, 30])
    rows = {row["method"]: row for row in packing.measure(lengths, num_steps=1) if row["ranks"] == 2}
    row = rows["ours"]
    assert row["tokens_of_budget"] == 400 / 4096 and row["labels_of_budget"] == 40 / 4096
    assert row["tokens_of_processed"] == 1 and row["labels_of_processed"] == 0.1
    assert row["imbalance"] == 1.5 and row["waiting_share"] == 200 / 600  # 300 against 200 on average
    one = {row["method"]: row for row in packing.measure(lengths, num_steps=1) if row["ranks"] == 1}
    assert one["padding"]["tokens_of_processed"] == 400 / 600 and one["padding"]["micro_batches"] == 1
    assert one["naive"]["imbalance"] == 1


def test_our_deal_waits_least() -> None:
    rows = packing.measure(packing.long_tailed_lengths(2000), num_steps=2)
    for ranks in (2, 8, 64):
        waiting = {row["method"]: row["waiting_share"] for row in rows if row["ranks"] == ranks}
        assert waiting["ours"] < 0.03 and waiting["ours"] < waiting["naive"] and waiting["ours"] < waiting["padding"]


def content(corpus: corpora.Corpus) -> dict[str, Any]:
    def row(name: str, rate: float | None, why: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {"name": name, "label": ROWS[name].label, "family": ROWS[name].family, "settings": "s"}
        if rate is None:
            return found | {"match": "FAIL", "why": why, "difference": 7.0}
        values = measure.spread([rate, rate * 1.1, rate * 0.9])
        keys = ("images_per_second", "cpu_ms_per_image", "first_seconds", "import_seconds")
        return found | {"match": "ok", "why": "", "difference": 1.0} | dict.fromkeys(keys, values)

    lengths = sizes(1, 200)
    return {
        "header": machine.header(corpus, cores=[0, 1], peers=None, batch_size=4, rounds=3),
        "notes": ["a note"],
        "loading": [
            row("ours", 300.0), row("webdataset_pil", 100.0), row("litdata_cv2", 150.0),
            row("streaming_cv2", None, "pixels differ by 7.0"), row("webdataset_ours", 280.0),
        ],
        "memory": [{"name": "ours", "label": "ours", "peak_bytes": 3e8, "bytes_per_image": 2.0, "images": 9},
                   {"name": "litdata_cv2", "label": "LitData", "error": "exit code 1"}],
        "resume": [{"label": "ours", "first_seconds_at_start": 0.5, "first_seconds_resumed": 0.6, "has_state": True,
                    "wrong": ""}, {"label": "LitData", "error": "exit code 1"}],
        "large_index": {"num_samples": 9, "places": [{"position": 0, "first_seconds": 0.4}]},
        "packing": packing.measure(lengths, num_steps=1),
    }  # fmt: skip


def test_tables_compare_with_the_best_correct_peer_and_print_what_failed(
    corpus: corpora.Corpus, tmp_path: Path
) -> None:
    found = content(corpus)
    report.write(tmp_path / "data.json", found)
    text = (tmp_path / "data.txt").read_text()
    assert json.loads((tmp_path / "data.json").read_text()) == json.loads(json.dumps(found))
    table = report.loading(found["loading"])
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "300 (270-330)" in lines["ours"] and "2.00" in lines["ours"], "LitData's 150 is the best peer"
    assert "1.87" in lines["webdataset, our decoding"], "which is no peer"
    failed = lines["MosaicML Streaming, OpenCV decode, INTER_AREA"]
    assert "FAIL" in failed and failed.endswith("pixels differ by 7.0") and "images" not in failed
    assert "exit code 1" in text and "0.40 s after 0 samples" in text and "a note" in text
    figure.draw(tmp_path / "data.png", found)
    assert (tmp_path / "data.png").stat().st_size > 10_000


def test_unknown_rows_and_too_many_cores_are_refused() -> None:
    from typer.testing import CliRunner

    from benchmarks.data.__main__ import app

    for arguments, words in ((["--only", "dali"], "dali"), (["--cores", "999"], "999")):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and words in result.output


def test_memory_and_resuming_are_measured_of_rows_that_exist() -> None:
    assert set(REPRESENTATIVES) <= set(ROWS)


def test_a_quick_run_of_ours_writes_tables_and_a_figure(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.data", "--quick", "--only", "ours", "--cores", "1", "--out",
        str(tmp_path / "data.json"), "--work", str(tmp_path / "work"), "--peers", str(tmp_path / "none"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "data.json").read_text())
    (row,) = found["loading"]
    assert row["match"] == "ok" and row["images_per_second"]["median"] > 0
    assert found["resume"][0]["wrong"] == "" and found["memory"][0]["peak_bytes"] > 0
    assert len(found["large_index"]["places"]) == 3
    assert "QUICK: small pictures, few samples. Not a result." in done.stdout
    assert (tmp_path / "data.png").exists()
