"""One loader behind one face: batches of keys and pixels of an epoch, and where it can, its state.

Every loader gets the same cores, `num_workers` processes (ours: threads), batches of the same number of samples,
shuffling on, and its documented settings for local data.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from benchmarks.data.corpus import LITDATA, MAX_IMAGES, MDS, SHARDS
from benchmarks.data.squares import SEED, SIZE, SQUARES, normalise_tensor
from samtrain.core.batch import IGNORE_INDEX
from samtrain.core.sample import IMAGE_PLACEHOLDER, EncodedText

PREFETCH = 2  # batches a worker works ahead: DataLoader's default; 4 changed nothing


class Batch(NamedTuple):
    """keys and images per sample, in order; pixels [I, 3, 224, 224] float32. A tuple, as the libraries expect one."""

    keys: list[str]
    counts: list[int]
    pixels: Tensor


@dataclass(frozen=True)
class LoaderOptions:
    """folder: of the corpus. square: a name in SQUARES; of ours: `full` or `reduced`."""

    folder: Path
    num_workers: int
    batch_size: int
    square: str
    rank: int = 0
    world_size: int = 1


class Loader(Protocol):
    """What is measured. `skip`: samples that a resumed run has had, where the library has no state of its own."""

    def epoch(self, *, skip: int = 0) -> Iterator[Batch]: ...

    def state(self, num_samples: int) -> Any:
        """JSON-able, after `num_samples` of the epoch; None where the library has none."""
        ...

    def load_state(self, state: Any) -> None: ...

    def close(self) -> None: ...


class OurLoader:
    """`TrainLoader` with threads, text encoding and packing included."""

    def __init__(self, options: LoaderOptions) -> None:
        from samtrain.data.index import ShardIndex
        from samtrain.data.loader import TrainLoader
        from samtrain.data.options import DataOptions

        data = DataOptions(
            path=str(options.folder),
            reduced_decode=options.square == "reduced",
            max_tokens=1 << 20,
            max_images=64,
            num_workers=options.num_workers,
            prefetch_steps=PREFETCH,
        )
        self._loader = TrainLoader(
            ShardIndex.load(options.folder / SHARDS),
            WordEncoder(),
            data,
            global_batch_size=options.batch_size * options.world_size,
            seed=SEED,
            rank=options.rank,
            world_size=options.world_size,
        )

    def epoch(self, *, skip: int = 0) -> Iterator[Batch]:
        done = self._loader.cursor["position"] % self._loader.order.length
        size = self._loader.order.global_batch_size
        for _ in range((self._loader.order.length - done) // size):
            for batch in next(self._loader).micro_batches:
                borders = batch.cu_images.tolist()
                yield Batch(list(batch.keys), [b - a for a, b in pairwise(borders)], batch.pixel_values)

    def state(self, num_samples: int) -> Any:
        return self._loader.cursor | {"position": num_samples}

    def load_state(self, state: Any) -> None:
        self._loader.load_cursor(state)

    def close(self) -> None:
        self._loader.close()


class WordEncoder:
    """One token a word; images first. Pixels as `SamMllmProcessor` makes them."""

    image_token_id = 3
    num_query_tokens = 32
    pad_token_id = 0
    qformer_pad_token_id = 0
    image_size = SIZE

    def encode(self, *, key: str, instruction: str, output: str | None, num_images: int) -> EncodedText:
        words = [10 + len(word) for word in instruction.replace(IMAGE_PLACEHOLDER, " ").split()]
        prompt = [self.image_token_id] * (num_images * self.num_query_tokens) + [1, *words]
        answer = [10 + len(word) for word in (output or "").split()]
        return EncodedText(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, words)

    def pixel_values(self, image: Image.Image | Tensor) -> Tensor:
        assert isinstance(image, Tensor), "the loader hands over squares"
        return normalise_tensor(image)


class WebdatasetLoader:
    """Plain webdataset on the same tars, with WebLoader, which shuffles shards and a buffer; batches in workers."""

    def __init__(self, options: LoaderOptions) -> None:
        self._options = options

    def epoch(self, *, skip: int = 0) -> Iterator[Batch]:
        import webdataset

        options = self._options
        urls = sorted(str(path) for path in (options.folder / SHARDS).glob("*.tar"))
        # Nothing in the library remembers where a worker was: the cheapest way back is to read on without decoding.
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=SEED, empty_check=False)
        dataset = dataset.compose(webdataset.detshuffle(200, seed=SEED))
        if skip:
            dataset = dataset.slice(skip // max(1, options.num_workers), 1 << 60)
        dataset = dataset.map(functools.partial(_from_tar, square=options.square))
        dataset = dataset.batched(options.batch_size, collation_fn=join, partial=True)
        return iter(
            webdataset.WebLoader(
                dataset, batch_size=None, num_workers=options.num_workers, prefetch_factor=PREFETCH,
                persistent_workers=True,
            )
        )  # fmt: skip

    def state(self, num_samples: int) -> Any:
        return None

    def load_state(self, state: Any) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class StreamingLoader:
    """MosaicML Streaming: StreamingDataset over local MDS files, StreamingDataLoader."""

    def __init__(self, options: LoaderOptions) -> None:
        from benchmarks.data.mosaic import import_streaming

        streaming: Any = import_streaming()
        streaming.base.util.clean_stale_shared_memory()
        square = options.square

        class Decoding(streaming.StreamingDataset):
            def __getitem__(self, at: Any) -> Any:
                return from_columns(super().__getitem__(at), square=square)

        dataset = Decoding(
            local=str(options.folder / MDS), batch_size=options.batch_size, shuffle=True, shuffle_seed=SEED
        )
        self._loader = streaming.StreamingDataLoader(
            dataset, batch_size=options.batch_size, num_workers=options.num_workers, prefetch_factor=PREFETCH,
            persistent_workers=True, collate_fn=join,
        )  # fmt: skip

    def epoch(self, *, skip: int = 0) -> Iterator[Batch]:
        return iter(self._loader)

    def state(self, num_samples: int) -> Any:
        return self._loader.dataset.state_dict(num_samples, from_beginning=True)

    def load_state(self, state: Any) -> None:
        self._loader.load_state_dict(state)

    def close(self) -> None: ...


class LitdataLoader:
    """LitData: StreamingDataset over local chunks, StreamingDataLoader; decoding as its `transform`."""

    def __init__(self, options: LoaderOptions) -> None:
        import litdata

        dataset = litdata.StreamingDataset(
            str(options.folder / LITDATA), shuffle=True, seed=SEED, drop_last=False,
            transform=functools.partial(from_columns, square=options.square),
        )  # fmt: skip
        self._loader = litdata.StreamingDataLoader(
            dataset, batch_size=options.batch_size, num_workers=options.num_workers, prefetch_factor=PREFETCH,
            persistent_workers=True, collate_fn=join,
        )  # fmt: skip

    def epoch(self, *, skip: int = 0) -> Iterator[Batch]:
        return iter(self._loader)

    def state(self, num_samples: int) -> Any:
        return self._loader.state_dict()

    def load_state(self, state: Any) -> None:
        self._loader.load_state_dict(state)

    def close(self) -> None: ...


LOADERS: dict[str, Callable[[LoaderOptions], Loader]] = {
    "ours": OurLoader,
    "webdataset": WebdatasetLoader,
    "streaming": StreamingLoader,
    "litdata": LitdataLoader,
}


def from_columns(sample: dict[str, Any], *, square: str) -> Batch:
    """A sample of MDS or LitData: its record parsed, its pictures decoded."""
    images = [data for n in range(MAX_IMAGES) if (data := sample[f"image{n}"])]
    return _sample(sample["key"], json.loads(sample["record"]), images, square)


def _from_tar(sample: dict[str, Any], *, square: str) -> Batch:
    record = json.loads(sample["json"])
    return _sample(record["key"], record, [sample[f"{n}.jpg"] for n in range(len(record["images"]))], square)


def _sample(key: str, record: dict[str, Any], images: list[bytes], square: str) -> Batch:
    if len(images) != len(record["images"]):
        raise ValueError(f"{key}: {len(images)} images, its record has {len(record['images'])}")
    decode = SQUARES[square]
    return Batch([key], [len(images)], torch.stack([decode(data, key, i) for i, data in enumerate(images)]))


def join(samples: list[Batch]) -> Batch:
    """Samples of one image count each to one batch."""
    return Batch(
        [key for sample in samples for key in sample.keys],
        [count for sample in samples for count in sample.counts],
        torch.cat([sample.pixels for sample in samples]),
    )
