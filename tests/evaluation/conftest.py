"""The tiny model of the generation tests, and a small split of real shards."""

import io
import runpy
from pathlib import Path

import pytest
import torch

from samtrain.data.index import ShardIndex
from samtrain.data.shards import ShardWriter

FIXTURES = Path(__file__).parent.parent / "generation" / "conftest.py"
TASKS = {"link": ("What is in both pictures?", ["a cat", "a dog", "a cat"]), "place": ("Where is the bird?", ["left"])}


@pytest.fixture(scope="session")
def fixtures():
    return runpy.run_path(str(FIXTURES))


@pytest.fixture(scope="session")
def processor(fixtures):
    return fixtures["make_processor"]()


@pytest.fixture(scope="session")
def model(fixtures, processor):
    return fixtures["make_model"](processor)


def png(seed):
    from PIL import Image

    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def make_split():
    """Write a split of 9 samples of two tasks with 1 to 3 images; `changes` replaces fields of one sample."""

    def make(folder, *, changes=None):
        with ShardWriter(folder) as writer:
            for i in range(9):
                task = "place" if i % 3 == 2 else "link"
                instruction, answers = TASKS[task]
                sample = {
                    "key": f"s{i}", "task": task, "instruction": f"{instruction} a dog" if i == 4 else instruction,
                    "output": answers[i % len(answers)], "images": [png(10 * i + n) for n in range(1 + i % 3)],
                }  # fmt: skip
                writer.write(**(sample | (changes or {}).get(i, {})))
        return ShardIndex.load(folder)

    return make
