"""The pictures that are loaded: multi-image JPEG samples, written once in every loader's own format.

The same bytes go into webdataset shards with our index (which plain webdataset reads too), MosaicML Streaming's MDS
and LitData's chunks. Everything follows from the options, so a folder that is there is used again.

Content: random parts of photographs, enlarged to 0.5 to 1 megapixel, in random brightness and contrast, and a field
with a photograph's 1/f spectrum on top, so that the bits per pixel are those of a camera's file. Without `photos` the
photographs are the two that scikit-learn ships.
"""

import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samtrain.core.errors import ConfigError
from samtrain.data.index import ShardIndex
from samtrain.data.shards import ShardWriter

FORMAT_VERSION = 3
MAX_IMAGES = 5
SHARDS = "shards"
MDS = "mds"
LITDATA = "litdata"
_FIELD_SIDE = 1024
_FIELD_SD = 6.0  # of 255
_NUM_FILES = 16  # about so many shards of each format: alike, and enough of them for all workers


@dataclass(frozen=True)
class CorpusOptions:
    """min_pixels, max_pixels: of a picture. photos: a folder of photographs in place of the packaged two."""

    num_samples: int = 480
    min_images: int = 3
    max_images: int = MAX_IMAGES
    min_pixels: int = 500_000
    max_pixels: int = 1_000_000
    quality: int = 90
    seed: int = 0
    photos: str | None = None


@dataclass(frozen=True)
class Corpus:
    """folder: holds the formats. facts: what the set is, for the header."""

    folder: Path
    facts: dict[str, Any]

    @property
    def index(self) -> ShardIndex:
        return ShardIndex.load(self.folder / SHARDS)


def build(work: Path, options: CorpusOptions) -> Corpus:
    """The set for `options` as webdataset shards, made where it is missing.

    Raises:
        ConfigError: no photograph can be read.
    """
    identity = json.dumps([FORMAT_VERSION, asdict(options)], sort_keys=True)
    folder = work / f"corpus-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    facts_file = folder / "facts.json"
    if not facts_file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        facts = _write_shards(folder / SHARDS, options)
        facts_file.write_text(json.dumps(facts, indent=1) + "\n")
    return Corpus(folder, json.loads(facts_file.read_text()))


def sample_fields(index: ShardIndex, i: int) -> dict[str, Any]:
    """A sample as MDS and LitData store it: key, record, and the encoded pictures in fixed columns (b"" where none)."""
    record, images = index.read_sample(i)
    columns = {f"image{n}": images[n] if n < len(images) else b"" for n in range(MAX_IMAGES)}
    return {"key": record.key, "record": record.to_json(), **columns}


def write_mds(corpus: Corpus) -> Path:
    """The set in MosaicML Streaming's format."""
    from benchmarks.data.mosaic import import_streaming

    folder = corpus.folder / MDS
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        columns = {"key": "str", "record": "str"} | {f"image{n}": "bytes" for n in range(MAX_IMAGES)}
        index = corpus.index
        with import_streaming().MDSWriter(out=str(folder), columns=columns, size_limit=_file_bytes(corpus)) as writer:
            for i in range(len(index)):
                writer.write(sample_fields(index, i))
    return folder


def write_litdata(corpus: Corpus) -> Path:
    """The set in LitData's format."""
    import litdata

    folder = corpus.folder / LITDATA
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        litdata.optimize(
            fn=_litdata_sample,
            inputs=[(str(corpus.folder), i) for i in range(len(corpus.index))],
            output_dir=str(folder),
            num_workers=1,
            chunk_bytes=_file_bytes(corpus),
        )
    return folder


def _file_bytes(corpus: Corpus) -> int:
    return corpus.facts["num_bytes"] // _NUM_FILES


@lru_cache(maxsize=1)
def _index(folder: str) -> ShardIndex:
    return ShardIndex.load(Path(folder) / SHARDS)


def _litdata_sample(item: tuple[str, int]) -> dict[str, Any]:
    folder, i = item
    return sample_fields(_index(folder), i)


def _write_shards(folder: Path, options: CorpusOptions) -> dict[str, Any]:
    photos, source = _photographs(options.photos)
    draw = np.random.default_rng(options.seed)
    field = _field(draw)
    num_bytes = num_pixels = num_images = 0
    with ShardWriter(folder, max_samples_per_shard=max(1, options.num_samples // _NUM_FILES)) as writer:
        for i in range(options.num_samples):
            images = []
            for _ in range(int(draw.integers(options.min_images, options.max_images + 1))):
                image = _picture(photos, field, draw, options)
                stream = io.BytesIO()
                image.save(stream, "JPEG", quality=options.quality)
                images.append(stream.getvalue())
                num_bytes, num_pixels = num_bytes + len(images[-1]), num_pixels + image.width * image.height
            num_images += len(images)
            writer.write(
                key=f"sample-{i:06d}",
                task="benchmark",
                instruction="What do these pictures have in common, and in what do they differ?",
                output="They show the same two places, cut and lit in other ways.",
                images=images,
                source="made by benchmarks.data",
                meta={},
            )
    return {
        "num_samples": options.num_samples,
        "num_images": num_images,
        "num_bytes": num_bytes,
        "megapixels_per_image": num_pixels / num_images / 1e6,
        "bits_per_pixel": 8 * num_bytes / num_pixels,
        "quality": options.quality,
        "content": source,
    }


def _photographs(folder: str | None) -> tuple[list[Image.Image], str]:
    """RGB photographs, and where they are from."""
    if folder is None:
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(image) for image in load_sample_images().images], "scikit-learn's two photographs"
    photos = list(_readable(Path(folder)))
    if not photos:
        raise ConfigError(f"--photos {folder}: no JPEG or PNG of at least 256 x 256 there")
    return photos, f"{len(photos)} photographs given with --photos"


def _readable(folder: Path) -> Iterator[Image.Image]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        with Image.open(path) as image:
            if min(image.size) >= 256:
                image.thumbnail((1600, 1600))
                yield image.convert("RGB")


def _field(draw: np.random.Generator) -> np.ndarray:
    """[side, side] float32, amplitude falling with the frequency, sd 1; it repeats without a seam."""
    noise = np.fft.rfft2(draw.standard_normal((_FIELD_SIDE, _FIELD_SIDE)))
    rows, columns = np.fft.fftfreq(_FIELD_SIDE)[:, None], np.fft.rfftfreq(_FIELD_SIDE)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = math.inf  # no mean
    values = np.fft.irfft2(noise / frequency, s=(_FIELD_SIDE, _FIELD_SIDE))
    return (values / values.std()).astype(np.float32)


def _picture(
    photos: list[Image.Image], field: np.ndarray, draw: np.random.Generator, options: CorpusOptions
) -> Image.Image:
    photo = photos[int(draw.integers(len(photos)))]
    area, ratio = draw.uniform(options.min_pixels, options.max_pixels), math.exp(draw.uniform(-0.4, 0.4))
    width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    share = draw.uniform(0.6, 1.0) * min(photo.width / width, photo.height / height)
    w, h = share * width, share * height
    left, top = draw.uniform(0, photo.width - w), draw.uniform(0, photo.height - h)
    enlarged = photo.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    pixels = np.asarray(enlarged, dtype=np.float32)
    pixels = (pixels - 128) * draw.uniform(0.7, 1.1) + 128 + draw.uniform(-20, 20)
    rows = (int(draw.integers(_FIELD_SIDE)) + np.arange(height)) % _FIELD_SIDE
    columns = (int(draw.integers(_FIELD_SIDE)) + np.arange(width)) % _FIELD_SIDE
    pixels += _FIELD_SD * field[np.ix_(rows, columns)][:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
