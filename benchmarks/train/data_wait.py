"""Does the loader keep the step waiting? The trainer's loader, its threads running, on a small set of real shards.

Pictures are smooth noise as JPEG, 640 x 480: as many bytes and as much decoding as photographs of that size. Texts have
the lengths of `lengths.py` in a tokenizer of one word a token.
"""

import io
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.train.lengths import Text, draw
from benchmarks.train.loops import OurLoop
from benchmarks.train.samples import BOS, EOS
from benchmarks.train.shapes import ModelShape
from samtrain.core.batch import IGNORE_INDEX
from samtrain.core.sample import EncodedText

SIZE = (640, 480)
PICTURES = 64  # different ones; samples share them


class WordEncoder:
    """`core.sample.SampleEncoder` of a shape: a word is a token, `prefix` layout."""

    def __init__(self, shape: ModelShape) -> None:
        self.image_token_id, self.num_query_tokens = shape.image_token_id, shape.num_query_tokens
        self.image_size = shape.image_size
        self.pad_token_id = self.qformer_pad_token_id = 0

    def encode(self, *, key: str, instruction: str, output: str | None, num_images: int) -> EncodedText:
        words = [3 + int(word) % (self.image_token_id - 3) for word in instruction.split()]
        answer = [3 + int(word) % (self.image_token_id - 3) for word in (output or "").split()]
        prompt = [self.image_token_id] * (num_images * self.num_query_tokens) + [BOS, *words]
        answer = [*answer, EOS]
        text = [3 + int(word) % 80 for word in instruction.split()]
        return EncodedText(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, text)

    def pixel_values(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        assert isinstance(image, torch.Tensor)  # what the loader hands over: [3, H, W] uint8 of the right size
        return torch.mul(image, 1 / 127.5).sub_(1.0)


def write_set(folder: Path, *, text: Text, samples: int, seed: int = 0) -> None:
    """Shards and index in `folder`/train."""
    from samtrain.data.shards import ShardWriter

    random, pictures = Random(seed), [_picture(seed + i) for i in range(PICTURES)]

    def words(count: int) -> str:
        return " ".join(str(random.randrange(30000)) for _ in range(max(0, count)))

    with ShardWriter(folder / "train") as writer:
        for i, lengths in enumerate(draw(text, samples, seed=seed)):
            writer.write(
                key=f"bench-{i:06d}",
                task="benchmark",
                instruction=words(lengths.prompt - 1),
                output=words(lengths.answer - 1),
                images=random.choices(pictures, k=lengths.images),
            )


def data_wait(
    loop: OurLoop, folder: Path, *, samples: int, steps: int, num_workers: int, max_images: int
) -> dict[str, Any]:
    """Train `steps` steps from the loader. Returns seconds waited for data, seconds in all, samples, skipped.

    The first steps, in which nothing is built ahead yet, are not counted: a run has thousands of others.
    """
    from samtrain.data.index import ShardIndex
    from samtrain.data.loader import TrainLoader
    from samtrain.data.options import DataOptions

    shape = loop.setting.shape
    options = DataOptions(
        path=str(folder),
        validation_split=None,
        image_size=shape.image_size,
        max_tokens=shape.max_tokens,
        max_images=max_images,
        num_workers=num_workers,
    )
    index: Any = ShardIndex.load(folder / "train")
    waited = 0.0
    skipped = 0
    since = time.perf_counter()
    first = options.prefetch_steps
    with TrainLoader(
        index, WordEncoder(shape), options, global_batch_size=samples, seed=0, rank=0, world_size=1
    ) as loader:
        for i in range(first + steps):
            if i == first:
                waited, since = 0.0, time.perf_counter()
            asked = time.perf_counter()
            step = next(loader)
            waited += time.perf_counter() - asked
            skipped += len(step.skipped)
            loop.step_on(step)
    seconds = time.perf_counter() - since
    return {"wait_seconds": waited, "seconds": seconds, "steps": steps, "samples": samples * steps, "skipped": skipped}


def _picture(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = random.integers(-12, 13, smooth.shape, dtype=np.int16)  # photographs do not compress like gradients
    stream = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()
