"""What a worker does with a job of each stage. A worker lives in a process of its own, builds its tools once, and turns
payloads into blobs; everything random comes from the payload's seed.
"""

import json
import time
import traceback
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samtrain.core.errors import SamtrainError
from samtrain.core.seeds import derive_seed
from samtrain.data.mini.stories.stock import recoloured
from samtrain.data.mmlink.captions import build_captioner
from samtrain.data.mmlink.compose import compose_grid, compose_scene
from samtrain.data.mmlink.fill import Background, build_filler
from samtrain.data.mmlink.fill.photographs import contrast
from samtrain.data.mmlink.fill.plain import on_plain
from samtrain.data.mmlink.fill.plates import clean_plate
from samtrain.data.mmlink.language import Facts, Scene, build_writer
from samtrain.data.mmlink.options import COVERS, ICONS, BuildConfig, parse_config
from samtrain.data.mmlink.pictures import flattened, from_png, jpeg, open_picture, perceptual_hash, png
from samtrain.data.mmlink.records import BACKGROUND, Failed, Job, Locator, Rejected
from samtrain.data.mmlink.segment import build_segmenter
from samtrain.data.mmlink.segment.cutout import cut_out
from samtrain.data.mmlink.sources.covers import draw_cover
from samtrain.data.mmlink.store import META, Blobs, Store

DONE, REJECTED, FAILED, FATAL = "done", "rejected", "failed", "fatal"
PICTURE = "picture.png"
_CACHE_BYTES = 256 * 2**20  # of decoded pictures a worker keeps

# key, status, ref, reason, seconds, cpu_seconds, error (name of its class), usage (of the stage's model so far)
Row = dict[str, Any]
Handler = Callable[[dict[str, Any]], Blobs]


class StageWorker:
    """Does batches of one stage's jobs and writes their results to the store."""

    def __init__(self, *, stage: str, config: dict[str, Any], work: str) -> None:
        self.stage = stage
        self.config = parse_config(config, source="configuration")
        self.store = Store(Path(work))
        self._tools: _Tools | None = None

    def run(self, jobs: list[Job]) -> list[Row]:
        """One row per job. Never raises: what must stop the build is a row that says so."""
        try:
            if self._tools is None:
                self._tools = _Tools(self.stage, self.config, self.store)
            handler, threads = self._tools.handler, self._tools.threads
        except Exception as error:
            return [_row(job, error, _Watch()) for job in jobs]
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                outcomes = list(pool.map(lambda job: _outcome(handler, job), jobs))
        else:
            outcomes = [_outcome(handler, job) for job in jobs]
        kept = [(row["key"], blobs) for row, blobs in outcomes if blobs is not None]
        try:
            times = {row["key"]: (round(row["seconds"], 4), round(row["cpu_seconds"], 4)) for row, _ in outcomes}
            refs = dict(zip((key for key, _ in kept), self.store.write(self.stage, kept, times)))
        except OSError as error:
            return [_row(job, SamtrainError(f"cannot write to {self.store.work}: {error}"), _Watch()) for job in jobs]
        usage = self._tools.usage()
        return [row | {"ref": refs.get(row["key"], ""), "usage": usage} for row, _ in outcomes]


def _outcome(handler: Handler, job: Job) -> tuple[Row, Blobs | None]:
    watch = _Watch()
    try:
        blobs = handler(job.payload)
    except Rejected as reason:  # a result like any other: not tried again
        row = _row(job, None, watch)
        return row | {"status": REJECTED, "reason": str(reason)}, {META: _json({"rejected": str(reason)})}
    except Exception as error:
        return _row(job, error, watch), None
    return _row(job, None, watch), blobs


class _Watch:
    """Time since it was made: by the clock, and of this thread on a core (what a busy machine does not change)."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.thread_time()

    def seconds(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self.started[0],
            "cpu_seconds": time.thread_time() - self.started[1],
        }


def _row(job: Job, error: Exception | None, watch: _Watch) -> Row:
    status, reason, name = DONE, "", ""
    if isinstance(error, Failed):
        status, reason = FAILED, str(error)
    elif isinstance(error, SamtrainError):
        status, reason, name = FATAL, str(error), type(error).__name__
    elif error is not None:
        status, name = FATAL, "Exception"
        reason = "".join(traceback.format_exception(error))
    row = {"key": job.key, "status": status, "ref": "", "reason": reason, "error": name, "usage": {}}
    return row | watch.seconds()


class _Tools:
    """The models of one stage, and the function that uses them."""

    def __init__(self, stage: str, config: BuildConfig, store: Store) -> None:
        self.config, self.store = config, store
        self.threads = 1
        self.writer: Any = None
        self.handler: Handler = getattr(self, f"_{stage}")
        # Stages that read a picture once keep none.
        pictures = config.build.pictures
        side = {"compose": pictures.max_side, "fill": pictures.max_background_side}.get(stage)
        kept = 0 if side is None else max(1, _CACHE_BYTES // (4 * side * side))
        self.picture = lru_cache(maxsize=kept)(self._picture)
        self.archive = lru_cache(maxsize=8)(zipfile.ZipFile)  # its table of contents is read once
        if stage == "segment":
            self.segmenter: Any = build_segmenter(config.segment)
        elif stage == "plates":
            self.segmenter = build_segmenter(config.segment) if config.build.plates.remove else None
        elif stage == "caption":
            self.captioner = build_captioner(config.captions)
        elif stage == "fill":
            self.filler = build_filler(config.fill)
        elif stage in ("describe", "write"):
            self.writer = build_writer(config.writer, work=store.work)
            self.threads = self.writer.concurrency

    def usage(self) -> dict[str, Any]:
        return self.writer.usage() if self.writer is not None else {}

    def _picture(self, ref: str) -> Image.Image:
        """Shared: not to be changed in place."""
        return from_png(self.store.read(ref, PICTURE))

    def _bytes(self, locator: Locator, *, max_bytes: int) -> bytes:
        """Raises Rejected where the file is larger than allowed, Failed where it is gone."""
        try:
            if locator.kind == "zip":
                archive = self.archive(locator.path)
                info = archive.getinfo(locator.member)
                if info.file_size > max_bytes:
                    raise Rejected(f"{info.file_size} bytes, more than pictures.max_bytes = {max_bytes}")
                return archive.read(info)
            with open(locator.path, "rb") as stream:
                data = stream.read(max_bytes + 1)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise Failed(f"{locator.path}: cannot be read: {error}") from None
        if len(data) > max_bytes:
            raise Rejected(f"more than pictures.max_bytes = {max_bytes} bytes")
        return data

    def _read(self, payload: dict[str, Any]) -> Blobs:
        options = self.config.build.pictures
        side = options.max_background_side if payload["role"] == BACKGROUND else options.max_side
        locator = Locator(**payload["locator"])
        if locator.kind == "drawn":
            picture = draw_cover(locator.member)
        else:
            data = self._bytes(locator, max_bytes=options.max_bytes)
            picture = open_picture(data, max_pixels=options.max_pixels, max_side=side)
        if payload.get("team"):
            team = payload["team"]
            picture = recoloured(picture.convert("RGBA"), team["palette"], team["range"])
        facts = {"width": picture.width, "height": picture.height, "alpha": picture.mode == "RGBA"}
        return {META: _json(facts), PICTURE: png(picture)}

    def _segment(self, payload: dict[str, Any]) -> Blobs:
        own_alpha = bool(self.config.segment.options.own_alpha)  # type: ignore[attr-defined]
        cut = cut_out(self.picture(payload["ref"]), self.segmenter, own_alpha=own_alpha)
        facts = {
            "width": cut.image.width,
            "height": cut.image.height,
            "area": round(cut.area, 5),
            "agreement": None if cut.agreement is None else round(cut.agreement, 5),
            "shape": perceptual_hash(cut.image),
        }
        return {META: _json(facts), PICTURE: png(cut.image)}

    def _plates(self, payload: dict[str, Any]) -> Blobs:
        plate = clean_plate(self.picture(payload["ref"]), self.segmenter, self.config.build.plates)
        return {META: _json({"removed": round(plate.removed, 4)}), PICTURE: png(plate.image)}

    def _caption(self, payload: dict[str, Any]) -> Blobs:
        image = flattened(self.picture(payload["ref"]), (255, 255, 255))
        text = self.captioner(image, name=payload["name"], caption=payload["caption"])
        return {META: _json({"caption": text})}

    def _compose(self, payload: dict[str, Any]) -> Blobs:
        options = self.config.build.compose
        blobs: Blobs = {}
        canvases = []
        for number, canvas in enumerate(payload["canvases"]):
            rng = np.random.default_rng(derive_seed("compose", payload["seed"], number))
            cutouts = [self.picture(thing["ref"]) for thing in canvas]
            if payload["domain"] == ICONS:
                drawn = compose_grid(cutouts, payload["grid"], options, rng)
            else:
                drawn = compose_scene(cutouts, [thing["mirror"] for thing in canvas], options, rng)
            blobs[f"{number}.things.png"] = png(drawn.things)
            blobs[f"{number}.mask.png"] = png(drawn.mask)
            canvases.append(drawn.objects)
        return blobs | {META: _json({"canvases": canvases})}

    def _describe(self, payload: dict[str, Any]) -> Blobs:
        said = []
        for canvas in payload["canvases"]:
            scene = Scene(tuple(canvas["things"]), tuple(canvas["scenes"]), canvas["seed"])
            said.append(self.writer.describe(scene))
        return {META: _json({"descriptions": said})}

    def _fill(self, payload: dict[str, Any]) -> Blobs:
        blobs: Blobs = {}
        contrasts, hashes = [], []
        for number, canvas in enumerate(payload["canvases"]):
            rng = np.random.default_rng(derive_seed("fill", payload["seed"], number))
            if payload["domain"] == COVERS:
                picture = flattened(self.picture(canvas["ref"]), (255, 255, 255))
            else:
                things = from_png(self.store.read(payload["ref"], f"{number}.things.png"))
                mask = from_png(self.store.read(payload["ref"], f"{number}.mask.png"))
                if payload["domain"] == ICONS:
                    picture = on_plain(things, rng)
                else:
                    plate = self.picture(canvas["plate"]) if canvas["plate"] else None
                    background = Background(canvas["description"], plate, canvas["held_out"])
                    picture = self.filler(things, background, rng)
                contrasts.append(round(contrast(things, picture, mask), 2))
            blobs[f"{number}.jpg"] = jpeg(picture)
            hashes.append(perceptual_hash(picture))
        return blobs | {META: _json({"contrasts": contrasts, "hashes": hashes})}

    def _write(self, payload: dict[str, Any]) -> Blobs:
        text = self.writer.write(Facts.from_dict(payload["facts"]))
        return {META: _json({"instruction": text.instruction, "answer": text.answer})}


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, sort_keys=True).encode()
