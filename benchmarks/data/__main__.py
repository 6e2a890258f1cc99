"""`python -m benchmarks.data`: our loader beside webdataset, MosaicML Streaming and LitData (benchmarks/README.md)."""

import io
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from benchmarks.data import corpus as corpora
from benchmarks.data import figure, machine, measure, packing, report
from benchmarks.data.rows import ROWS
from samtrain.core.errors import SamtrainError
from samtrain.data.index import INDEX_FILE
from samtrain.data.parallel import available_cores
from samtrain.data.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / ".venv" / "peers"
MMLINK_MINI = ROOT / "data" / "mmlink-mini" / "train"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command(help=__doc__)
def main(
    work: Annotated[Path | None, typer.Option(help="folder of the sets, used again; none: a temporary one")] = None,
    out: Annotated[Path, typer.Option(help="JSON file; text and figure go beside it")] = RESULTS / "data.json",
    peers: Annotated[Path, typer.Option(help="folder that holds the peers' packages")] = PEERS,
    photos: Annotated[str | None, typer.Option(help="folder of photographs for the pictures' content")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"rows: {', '.join(ROWS)}")] = None,
    rounds: Annotated[int, typer.Option(help="timed epochs of every row", min=1)] = 5,
    cores: Annotated[int, typer.Option(help="cores and workers of every row", min=1)] = 2,
    samples: Annotated[int, typer.Option(help="samples of the set", min=16)] = 480,
    batch_size: Annotated[int, typer.Option(help="samples of a batch", min=1)] = 16,
    min_pixels: Annotated[int, typer.Option(help="pixels of the smallest picture", min=60_000)] = 500_000,
    max_pixels: Annotated[int, typer.Option(help="and of the largest", min=60_000)] = 1_000_000,
    quick: Annotated[bool, typer.Option(help="small pictures, few samples: that it runs, not a result")] = False,
) -> None:
    names = only or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise typer.BadParameter(f"--only {', '.join(unknown)}: choose from {', '.join(ROWS)}")
    if cores > available_cores():
        raise typer.BadParameter(f"--cores {cores}: this process may use {available_cores()}")
    if min_pixels > max_pixels:
        raise typer.BadParameter(f"--min-pixels {min_pixels} is more than --max-pixels {max_pixels}")
    options = corpora.CorpusOptions(num_samples=samples, min_pixels=min_pixels, max_pixels=max_pixels, photos=photos)
    num_large, num_steps, epochs = 100_000, packing.NUM_STEPS, 3
    if quick:
        options = replace(options, num_samples=32, min_pixels=70_000, max_pixels=90_000)
        rounds, batch_size, num_large, num_steps, epochs = 1, 4, 200, 2, 1
    with tempfile.TemporaryDirectory() as temporary:
        try:
            content = _run(
                work or Path(temporary), options, names=names, peers=peers if peers.is_dir() else None, rounds=rounds,
                cores=sorted(os.sched_getaffinity(0))[:cores], batch_size=batch_size, num_large=num_large,
                num_steps=num_steps, epochs=epochs,
            )  # fmt: skip
        except SamtrainError as error:
            say(str(error))
            raise typer.Exit(2) from None
    if quick:
        content["notes"].append("QUICK: small pictures, few samples. Not a result.")
    report.write(out, content)
    figure.draw(out.with_suffix(".png"), content)
    print(out.with_suffix(".txt").read_text(), end="")
    say(f"wrote {out}, {out.with_suffix('.txt')} and {out.with_suffix('.png')}")
    wrong = [row["label"] for row in content["loading"] if row["family"] == "ours" and row["match"] != "ok"]
    if wrong:
        say("our rows that failed the gate: " + "; ".join(wrong))
        raise typer.Exit(1)


def _run(
    work: Path,
    options: corpora.CorpusOptions,
    *,
    names: list[str],
    peers: Path | None,
    rounds: int,
    cores: list[int],
    batch_size: int,
    num_large: int,
    num_steps: int,
    epochs: int,
) -> dict[str, Any]:
    if peers:
        sys.path.append(str(peers))  # behind our own: what both have is ours
    say("the set: shards, MDS, LitData")
    corpus = corpora.build(work, options)
    loaders = {ROWS[name].loader for name in names}
    bench = measure.Bench(corpus, cores, batch_size, peers, say)
    for loader, write in (("streaming", corpora.write_mds), ("litdata", corpora.write_litdata)):
        if loader in loaders and not bench.missing(next(row for row in ROWS.values() if row.loader == loader)):
            write(corpus)
    large = _large_set(work / f"large-{num_large}", num_large)
    header = machine.header(corpus, cores=cores, peers=peers, batch_size=batch_size, rounds=rounds)
    measure.warm(corpus.folder)
    loading = measure.load_rows(bench, names, rounds=rounds)
    chosen = measure.representatives(loading)
    sets = [packing.long_tailed_lengths()]
    notes = []
    if (MMLINK_MINI / INDEX_FILE).exists():
        sets.insert(0, packing.mmlink_lengths(MMLINK_MINI))
    else:
        notes.append("packing of mmlink-mini: not there (data/mmlink-mini); `make train` builds it")
    content = {
        "header": header,
        "notes": notes,
        "loading": loading,
        "memory": [_tried(lambda n=name: measure.memory(bench, n, epochs=epochs), name) for name in chosen],
        "resume": [_tried(lambda n=name: measure.resume(bench, n), name) for name in chosen],
        "large_index": {
            "num_samples": num_large,
            "places": measure.first_of_large(bench, large, num_samples=num_large),
        },
        "packing": [row for lengths in sets for row in packing.measure(lengths, num_steps=num_steps)],
    }
    return content


def _tried(function: Any, name: str) -> dict[str, Any]:
    """A measurement, or why there is none."""
    say(f"memory or resuming of {ROWS[name].label}")
    try:
        return function()
    except measure.ChildFailedError as error:
        return {"name": name, "label": ROWS[name].label, "error": str(error)}


def _large_set(folder: Path, num_samples: int) -> Path:
    """Many samples of one tiny picture: what an index costs."""
    shards = folder / corpora.SHARDS
    if not (shards / INDEX_FILE).exists():
        say(f"a set of {num_samples} samples")
        stream = io.BytesIO()
        Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(stream, "JPEG")
        with ShardWriter(shards, max_samples_per_shard=5000) as writer:
            for i in range(num_samples):
                writer.write(
                    key=f"large-{i:07d}", task="benchmark", instruction="What is this?", output="A black square.",
                    images=[stream.getvalue()], source="made by benchmarks.data", meta={},
                )  # fmt: skip
    return folder


if __name__ == "__main__":
    app()
