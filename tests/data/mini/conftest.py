"""A small real build, shared by the tests of this folder. The art comes from the user's cache, or from the registry."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samtrain.data.mini import build_mini
from samtrain.data.mini.art import Stock, render_stock
from samtrain.data.mini.build import _default_cache
from samtrain.data.mini.sources import SourcesUnavailable, attribution
from samtrain.data.mini.stories import installed
from samtrain.data.options import MiniOptions

SPLITS = ("train", "validation", "test_style", "test_combination", "test_identity")


@pytest.fixture(autouse=True)
def no_installed_game(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test builds does not depend on what this machine has installed."""
    monkeypatch.setattr(installed, "_PLACES", ())


@pytest.fixture(scope="session")
def cache() -> Path:
    """A cache that holds every source and the rendered art."""
    folder = _default_cache()
    try:
        render_stock(folder / "mini", num_workers=2, progress=lambda what, done, total: None)
        attribution(folder / "mini")
    except SourcesUnavailable as error:
        pytest.skip(f"the art is not in {folder} and cannot be fetched: {error}")
    return folder


@pytest.fixture(scope="session")
def stock(cache: Path) -> Stock:
    return Stock(render_stock(cache / "mini", num_workers=2, progress=lambda what, done, total: None))


@pytest.fixture(scope="session")
def options() -> MiniOptions:
    return MiniOptions(num_train=60, num_eval=20, seed=3, stories="never")


@pytest.fixture(scope="session")
def built(cache: Path, options: MiniOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "set"
    build_mini(folder, options, cache=cache)
    return folder


@pytest.fixture(scope="session")
def samples(built: Path) -> dict[str, list[dict[str, Any]]]:
    """split -> records, each with its masks as arrays under "masks" and decoded picture sizes under "sizes"."""
    return {split: list(_read(built / split)) for split in SPLITS}


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        for name, data in content.items():
            if name.endswith(".json"):
                record = json.loads(data)
                key = record["key"]
                count = len(record["images"])
                record["masks"] = [np.array(_image(content[f"{key}.{i}.mask.png"])) for i in range(count)]
                record["sizes"] = [_image(content[f"{key}.{i}.jpg"]).size for i in range(count)]
                yield record


def _image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
