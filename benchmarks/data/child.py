"""One loader in one process: `python -m benchmarks.data.child JOB`, a line of JSON on its standard output.

A fresh process for every measurement: nothing of a row's (workers, caches, threads) is there while another is timed.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_START = time.monotonic()


@dataclass(frozen=True)
class Job:
    """What a child does.

    kind: rate (one epoch, timed), check (one epoch: all keys, some pixels), memory (`epochs` epochs, time stamps),
        state (`num_seen` samples, then the loader's state), resume (the rest, from `state`, or by skipping `num_seen`),
        or first (the first batch after `num_seen` samples; of ours, whose state is a number).
    cores: this process and its workers run there alone. peers: folder of the peers' packages.
    out: file for the pixels of `check_keys` (check).
    """

    kind: str
    loader: str
    square: str
    folder: str
    num_workers: int
    batch_size: int
    cores: list[int]
    peers: str = ""
    epochs: int = 1
    rank: int = 0
    world_size: int = 1
    state: Any = None
    num_seen: int = 0
    check_keys: list[str] | None = None
    out: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


WARM_UP = 0.15  # share of the epoch before the clock starts: workers have started, all queues are as they stay


def run(job: Job) -> dict[str, Any]:
    """Do a job in this process."""
    import torch

    torch.set_num_threads(1)
    try:
        import cv2

        cv2.setNumThreads(0)
    except ImportError:
        pass
    from benchmarks.data.loaders import LOADERS, LoaderOptions

    if job.loader == "litdata":
        import litdata  # noqa: F401
    elif job.loader == "streaming":
        from benchmarks.data.mosaic import import_streaming

        import_streaming()
    elif job.loader == "webdataset":
        import webdataset  # noqa: F401
    else:
        import samtrain.data.loader  # noqa: F401
        from samtrain.core.host_memory import return_freed_blocks

        return_freed_blocks()  # as a training process on a GPU does
    options = LoaderOptions(Path(job.folder), job.num_workers, job.batch_size, job.square, job.rank, job.world_size)
    begun = time.monotonic()
    loader = LOADERS[job.loader](options)
    if job.kind == "resume" and job.state is not None:
        loader.load_state(job.state)
    if job.kind == "first":
        loader.load_state(loader.state(job.num_seen))
    result = _measure(job, loader, begun)
    loader.close()
    return result | {"import_seconds": begun - _START}


def _measure(job: Job, loader: Any, begun: float) -> dict[str, Any]:
    times: list[float] = []
    cpu: list[float] = []
    images: list[int] = []
    keys: list[str] = []
    counts: list[int] = []
    pixels: dict[str, Any] = {}
    state = None
    for epoch in range(job.epochs):
        skip = job.num_seen if job.kind == "resume" and job.state is None else 0
        for batch in loader.epoch(skip=skip):
            times.append(time.monotonic())
            cpu.append(_cpu_seconds() if job.kind == "rate" else 0.0)
            images.append(int(batch.pixels.shape[0]))
            if epoch == 0:
                keys += batch.keys
                counts += batch.counts
            if job.kind == "check":
                _keep(pixels, batch, job.check_keys or [])
            if job.kind == "state" and len(keys) >= job.num_seen:
                state = loader.state(len(keys))
                break
            if job.kind == "first":
                break
    if job.kind == "check":
        import numpy as np

        np.savez(job.out, **pixels)
    found: dict[str, Any] = {
        "first_seconds": times[0] - begun,
        "num_images": sum(images),
        **_rates(times, cpu, images),
    }
    if job.kind == "memory":
        found |= {"first_at": times[0], "ended_at": times[-1]}
    if job.kind in ("check", "state", "resume"):
        found |= {"keys": keys, "counts": counts, "state": state}
    return found


def _rates(times: list[float], cpu: list[float], images: list[int]) -> dict[str, float]:
    """Images a second and CPU milliseconds an image, between the batch at WARM_UP of the epoch and the last."""
    total, seen = sum(images), 0
    for i, count in enumerate(images[:-1]):
        seen += count
        if seen >= WARM_UP * total:
            rest, seconds = total - seen, times[-1] - times[i]
            return {"images_per_second": rest / seconds, "cpu_ms_per_image": 1e3 * (cpu[-1] - cpu[i]) / rest}
    return {}


def _cpu_seconds() -> float:
    """Of this process and its workers, so far."""
    import psutil

    me = psutil.Process()
    spent = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(times.user + times.system for times in spent)


def _keep(pixels: dict[str, Any], batch: Any, wanted: list[str]) -> None:
    place = 0
    for key, count in zip(batch.keys, batch.counts):
        if key in wanted:
            pixels[key] = batch.pixels[place : place + count].numpy().copy()
        place += count


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    if job.peers:
        sys.path.append(job.peers)  # behind our own: what both have is ours
    print(json.dumps(run(job)), flush=True)
    # Some libraries' threads and workers do not end by themselves.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
