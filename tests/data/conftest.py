"""A whitespace tokenizer as `SampleEncoder`, and small sets of real JPEG shards."""

import io
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samtrain.cli import main
from samtrain.core.batch import IGNORE_INDEX
from samtrain.core.errors import DataError
from samtrain.core.sample import EncodedText
from samtrain.data.index import ShardIndex
from samtrain.data.options import DataOptions
from samtrain.data.shards import ShardWriter


class WordEncoder:
    """One token a word; images first, `num_query_tokens` image tokens each; BOS in front, EOS after the answer."""

    image_token_id = 3
    num_query_tokens = 4
    pad_token_id = 0
    qformer_pad_token_id = 0
    image_size = 32

    def encode(self, *, key: str, instruction: str, output: str | None, num_images: int) -> EncodedText:
        placeholders = instruction.count("<image>")
        if placeholders not in (0, num_images):
            raise DataError(f"{key}: {placeholders} placeholders but {num_images} images")
        if "unencodable" in instruction:
            raise DataError(f"{key}: cannot be encoded")
        words = [self._word(word) for word in instruction.replace("<image>", " ").split()]
        prompt = [1] + [self.image_token_id] * (num_images * self.num_query_tokens) + words
        answer = [] if output is None else [*(self._word(word) for word in output.split()), 2]
        return EncodedText(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, words)

    def pixel_values(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        if isinstance(image, Image.Image):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert image.shape == (3, self.image_size, self.image_size)
        return image.float() / 127.5 - 1

    @staticmethod
    def _word(word: str) -> int:
        return 10 + zlib.crc32(word.encode()) % 1000


@pytest.fixture
def encoder() -> WordEncoder:
    return WordEncoder()


@pytest.fixture
def make_jpeg() -> Callable[..., bytes]:
    def make(seed: int, *, width: int = 48, height: int = 40, image_format: str = "JPEG") -> bytes:
        small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(small).resize((width, height)).save(stream, image_format)
        return stream.getvalue()

    return make


@pytest.fixture
def write_set(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Callable[..., Path]:
    """write_set(name, counts) writes samples with so many images each and returns the folder."""

    def write(name: str, counts: list[int], *, images: dict[int, list[bytes]] | None = None, **options: int) -> Path:
        folder = tmp_path / name
        with ShardWriter(folder, **options) as writer:
            for i, count in enumerate(counts):
                writer.write(
                    key=f"{name}-{i:04d}",
                    task="group" if i % 2 else "story",
                    instruction="what is shared by these pictures " + "word " * (i % 7),
                    output="a red fox " + "yes " * (i % 5),
                    images=(images or {}).get(i) or [make_jpeg(100 * i + j) for j in range(count)],
                    source="made by a test",
                    meta={"number": i},
                )
        return folder

    return write


@pytest.fixture
def fifty(write_set: Callable[..., Path]) -> ShardIndex:
    """50 samples of 1 to 5 images in 4 shards."""
    return ShardIndex.load(write_set("fifty", [1 + i * 7 % 5 for i in range(50)], max_samples_per_shard=15))


@pytest.fixture
def options(tmp_path: Path) -> DataOptions:
    return DataOptions(path=str(tmp_path), image_size=32, max_tokens=160, max_images=12, num_workers=2)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run_cli("lint", folder, ...) -> exit code, stdout, stderr of `samtrain data lint ...`."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["samtrain", "data", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exited:
            main()
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err

    return run
