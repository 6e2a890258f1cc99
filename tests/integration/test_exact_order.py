"""The proof of exact resume: real processes in real gloo groups are killed with SIGKILL and go on as other groups.

The reference is one uninterrupted process. Every chain of killed and resumed groups, with other numbers of ranks and
workers, other budgets (so other accumulation) and other prefetching, must leave the same ledger: the same keys used and
skipped in every step, the same running hash. The set is damaged: single samples, a shard that is gone, and a shard
whose pictures are mostly garbage, which is given up in the middle of the run.
"""

import importlib.util
import io
import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from samtrain.core.distributed import all_gather_object
from samtrain.core.files import atomic_write_json
from samtrain.data.index import ShardIndex
from samtrain.data.ledger import Ledger
from samtrain.data.loader import TrainLoader
from samtrain.data.mixture import open_training_set
from samtrain.data.options import DataOptions
from samtrain.data.shards import ShardWriter

BATCH, STEPS, SEED = 24, 18, 11
BIG, SMALL, SHARD = 96, 20, 12  # samples of the sources, and of a shard
GARBAGE = "shard-000005.tar"
KILLS = ("before the ledger", "in the ledger's line", "after the ledger")

_spec = importlib.util.spec_from_file_location("data_conftest", Path(__file__).parents[1] / "data" / "conftest.py")
data_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(data_conftest)


@dataclass(frozen=True)
class Group:
    """One group of processes, killed after `lives` of its steps (0: it ends by itself)."""

    ranks: int
    num_workers: int = 1
    max_tokens: int = 160
    prefetch_steps: int = 2
    lives: int = 0
    kill: str = KILLS[0]
    save_steps: int = 1


def write_source(folder, count, generator):
    with ShardWriter(folder / "train", max_samples_per_shard=SHARD) as writer:
        for i in range(count):
            images = []
            for _ in range(1 + i % 3):
                stream = io.BytesIO()
                pixels = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((24, 20)).save(stream, "JPEG")
                images.append(stream.getvalue())
            text = "what do these share " + "word " * (i % 7)
            writer.write(key=f"s-{i:03d}", task="t", instruction=text, output="yes " * (1 + i % 5), images=images)


def overwrite(index, i, *, record=False):
    """Zeros over the pictures of sample i, or over its record, in the shard."""
    entry = index.entries[i]
    with open(index.folder / index.shards[entry.shard], "r+b") as stream:
        for offset, size in [entry.record] if record else entry.images:
            stream.seek(offset)
            stream.write(bytes(size))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources with the same keys; `big` is damaged after it was indexed."""
    folder, generator = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    write_source(folder / "big", BIG, generator)
    write_source(folder / "small", SMALL, generator)
    index = ShardIndex.load(folder / "big" / "train")
    overwrite(index, 7)
    overwrite(index, 40, record=True)
    for i in range(5 * SHARD + 2, 6 * SHARD):  # two samples of the shard are good
        overwrite(index, i)
    (index.folder / index.shards[2]).unlink()
    return folder


def data_of(sources, kind):
    values = {"image_size": 32, "max_images": 9, "max_bad_fraction": 1.0, "validation_split": None}
    if kind != "mixture":
        return values | {"path": str(sources / "big"), "shuffle": kind, "shuffle_block_shards": 2}
    members = [
        {"name": "rare", "path": str(sources / "small"), "weight": 1.0},
        {"name": "common", "path": str(sources / "big"), "weight": 2.5},
    ]
    return values | {"mixture": members, "shuffle": "shards", "shuffle_block_shards": 3}


def run_rank(rank, group, number, folder, data):
    """One rank of the group `number`; whatever it says goes to a file."""
    log = os.open(folder / f"{number}-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stderr.fileno())
    store = f"file://{folder / f'store-{number}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=group.ranks)
    train(rank, group, folder, data, told=folder / f"{number}-{rank}.jsonl")
    dist.destroy_process_group()


def train(rank, group, folder, data, *, told):
    """Go on from the checkpoint, if there is one, to the last step or to this group's death."""
    changes = {name: getattr(group, name) for name in ("num_workers", "max_tokens", "prefetch_steps")}
    options = DataOptions(**(data | changes))
    index = open_training_set(options, tolerate_broken_shards=True)
    loader = TrainLoader(
        index, data_conftest.WordEncoder(), options,
        global_batch_size=BATCH, seed=SEED, rank=rank, world_size=group.ranks,
    )  # fmt: skip
    checkpoint, step = folder / "checkpoint.json", 0
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        step = saved["step"]
        loader.load_cursor(saved["cursor"])
    ledger = Ledger.open(folder / "ledger.jsonl", resume_step=step) if rank == 0 else None
    last = step + group.lives if group.lives else STEPS

    def die_here(moment):
        if rank == 0 and group.lives and step == last and group.kill == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    with loader, open(told, "w") as stream:
        while step < STEPS:
            part = next(loader)
            step += 1
            skipped = {key: why for found in all_gather_object(part.skipped) for key, why in found.items()}
            used = [key for batch in part.micro_batches for key in batch.keys]
            line = {"step": step, "keys": part.keys, "used": used, "skipped": sorted(part.skipped)}
            stream.write(json.dumps(line | {"micro_batches": len(part.micro_batches)}) + "\n")
            stream.flush()
            if ledger is not None:
                die_here("before the ledger")
                ledger.record(step, part.keys, skipped, quarantined=part.quarantined)
                if group.kill == "in the ledger's line" and group.lives and step == last:
                    os.truncate(ledger.path, ledger.path.stat().st_size - 30)
                die_here("in the ledger's line")
                die_here("after the ledger")
                if step % group.save_steps == 0:
                    ledger.sync()
                    atomic_write_json(checkpoint, {"step": step, "cursor": part.cursor})


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", "samtrain.cli", "samtrain.data.loader"])
    return context


@pytest.fixture
def run_group(context):
    """run_group(group, number, folder, data): to its end, or to its death, of all its ranks."""
    started = []

    def run(group, number, folder, data):
        ranks = [
            context.Process(target=run_rank, args=(rank, group, number, folder, data)) for rank in range(group.ranks)
        ]
        started.extend(ranks)
        for process in ranks:
            process.start()
        ranks[0].join(240)
        for process in ranks[1:]:
            process.kill() if group.lives else process.join(60)
            process.join(60)
        logs = "\n".join((folder / f"{number}-{rank}.log").read_text() for rank in range(group.ranks))
        first, others = ranks[0].exitcode, [process.exitcode for process in ranks[1:]]
        assert first == (-signal.SIGKILL if group.lives else 0), logs
        assert group.lives or others == [0] * (group.ranks - 1), logs

    yield run
    for process in started:
        if process.is_alive():
            process.kill()


@pytest.fixture(scope="module")
def reference(sources, tmp_path_factory):
    """kind -> (folder, lines of the ledger) of one process that was never interrupted and builds nothing ahead."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            train(0, Group(1, num_workers=0), folder, data_of(sources, kind), told=folder / "0-0.jsonl")
            made[kind] = folder, ledger_of(folder)
        return made[kind]

    return get


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ledger_of(folder):
    """Of each step: used keys in order, skipped keys, shards given up, running hash."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [
        (line["keys"], sorted(line["skipped"]), list(line.get("quarantined", ())), line["digest"]) for line in lines
    ]


def assert_every_step_is_dealt_out_once(folder, groups):
    """The parts of the ranks are a partition of every step they all lived to see, in equally many micro-batches."""
    seen = set()
    for number, group in enumerate(groups):
        told = [
            {
                line["step"]: line
                for line in map(json.loads, (folder / f"{number}-{rank}.jsonl").read_text().splitlines())
            }
            for rank in range(group.ranks)
        ]
        for step in set.intersection(*map(set, told)):
            parts = [lines[step] for lines in told]
            dealt = Counter(key for part in parts for key in [*part["used"], *part["skipped"]])
            assert dealt == Counter(parts[0]["keys"]), (group, step)
            assert len({part["micro_batches"] for part in parts}) == 1
            seen.add(step)
    return seen


CHAINS = {
    "full": [(2, 1), (8, 0), (3, 2), (1, 1), (4, 2)],
    "shards": [(8, 1), (1, 0), (4, 2), (2, 1), (3, 0)],
    "none": [(3, 2), (8, 1), (1, 2), (2, 0)],
    "mixture": [(4, 0), (3, 1), (8, 2), (1, 1), (2, 2)],
}


@pytest.mark.parametrize("kind", CHAINS)
def test_killed_and_resumed_on_other_ranks_the_run_continues_with_exactly_the_keys_that_were_left(
    sources, reference, run_group, tmp_path, kind
):
    draw = random.Random(f"{kind} 1")
    groups = [
        Group(
            ranks,
            num_workers=num_workers,
            max_tokens=draw.choice([60, 100, 400]),
            prefetch_steps=draw.choice([1, 2, 4]),
            lives=draw.randint(2, 5),
            kill=draw.choice(KILLS),
            save_steps=draw.choice([1, 1, 2]),
        )
        for ranks, num_workers in CHAINS[kind]
    ]
    groups.append(Group(*CHAINS[kind][0], max_tokens=80))
    for number, group in enumerate(groups):
        run_group(group, number, tmp_path, data_of(sources, kind))
    _, expected = reference(kind)
    assert ledger_of(tmp_path) == expected, groups
    assert assert_every_step_is_dealt_out_once(tmp_path, groups) == set(range(1, STEPS + 1))


@pytest.mark.parametrize(("kind", "ranks"), [("full", 3), ("shards", 4), ("mixture", 8), ("mixture", 2)])
def test_any_number_of_ranks_sees_what_one_sees(sources, reference, run_group, tmp_path, kind, ranks):
    group = Group(ranks, num_workers=2, prefetch_steps=4)
    run_group(group, 0, tmp_path, data_of(sources, kind))
    folder, expected = reference(kind)
    assert ledger_of(tmp_path) == expected
    assert len(assert_every_step_is_dealt_out_once(tmp_path, [group])) == STEPS
    cursors = [json.loads((where / "checkpoint.json").read_text())["cursor"] for where in (folder, tmp_path)]
    for cursor in cursors:  # reasons hold paths and, of pictures, what the rank's library said
        cursor["bad"]["quarantined"] = list(cursor["bad"]["quarantined"])
    assert cursors[0] == cursors[1]


@pytest.mark.parametrize("kind", CHAINS)
def test_the_reference_meets_every_key_once_an_epoch_and_gives_the_broken_shards_up(sources, reference, kind):
    folder, ledger = reference(kind)
    lines = read_lines(folder / "0-0.jsonl")
    keys = [key for line in lines for key in line["keys"]]
    by_source = {"": (keys, BIG)}
    if kind == "mixture":
        by_source = {
            name: ([key for key in keys if key.startswith(f"{name}/")], length)
            for name, length in {"rare": SMALL, "common": BIG}.items()
        }
        assert sum(len(mine) for mine, _ in by_source.values()) == len(keys)
        assert len(by_source["common"][0]) / len(by_source["rare"][0]) == pytest.approx(2.5, rel=0.1)
    for mine, length in by_source.values():
        assert len(mine) > 2 * length
        for start in range(0, len(mine) - length, length):
            assert len(set(mine[start : start + length])) == length
    prefix = "common/" if kind == "mixture" else ""
    given_up = {shard: step for step, line in enumerate(ledger) for shard in line[2]}
    assert given_up.keys() == {prefix + "shard-000002.tar", prefix + GARBAGE}
    good = {f"{prefix}s-{i:03d}" for i in (5 * SHARD, 5 * SHARD + 1)}
    fate = [(step <= given_up[prefix + GARBAGE], key in used) for step, (used, skipped, *_) in enumerate(ledger)
            for key in good & {*used, *skipped}]  # fmt: skip
    assert (True, True) in fate and (False, False) in fate  # used before, skipped after: order matters here
    assert (False, True) not in fate
