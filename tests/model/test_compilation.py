"""Compiled layers of the vision tower compute what they did, for any number of images, and leave no trace."""

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import ConvNextConfig, InstructBlipVisionConfig

from samtrain.core.errors import ConfigError
from samtrain.model.compilation import choose_compile_vision, compile_layers
from samtrain.model.vision import build_vision_model

VIT = InstructBlipVisionConfig(
    hidden_size=12, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2, image_size=8, patch_size=4
)
CONVOLUTIONAL = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)


def run(tower: torch.nn.Module, num_images: int) -> torch.Tensor:
    pixels = torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(num_images))
    return tower(pixel_values=pixels).last_hidden_state


@pytest.mark.parametrize("config", [VIT, CONVOLUTIONAL], ids=["vit", "convolutional"])
def test_two_compilations_serve_every_layer_and_number_of_images(config: Any) -> None:
    tower = build_vision_model(config).eval().requires_grad_(False)
    names = list(tower.state_dict())
    # 9 is no other size of these towers: PyTorch takes equal sizes for the same, and would compile once more.
    expected = {num_images: run(tower, num_images) for num_images in (9, 1, 2, 7)}
    counter: Any = CompileCounter()
    compile_layers(tower, backend=counter)
    for num_images, features in expected.items():
        assert (run(tower, num_images) - features).abs().max() < 1e-6
    assert counter.frame_count == 2 and list(tower.state_dict()) == names


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++ on a CPU")
def test_inductor_gives_the_same_features() -> None:
    tower = build_vision_model(VIT).eval().requires_grad_(False)
    expected = {num_images: run(tower, num_images) for num_images in (3, 2, 5)}
    compile_layers(tower)
    for num_images, features in expected.items():
        assert (run(tower, num_images) - features).abs().max() < 1e-5  # float32, fused


@pytest.mark.parametrize(
    ("asked", "trains", "device", "words"),
    [
        ("auto", False, "cuda", "the tower's layers, frozen"),
        (True, False, "cpu", "the tower's layers, frozen"),
        ("auto", False, "cpu", "off: auto compiles on a GPU and this runs on cpu"),
        ("auto", True, "cuda", "off: the tower trains"),
        (False, False, "cuda", "off: model.compile_vision: false"),
    ],
)
def test_auto_compiles_a_frozen_tower_on_a_gpu(asked: Any, trains: bool, device: str, words: str) -> None:
    is_on, found = choose_compile_vision(asked, vision_trains=trains, device_type=device)
    assert found == words and is_on is not found.startswith("off")


def test_a_tower_that_trains_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="compile_vision is true, but the tower trains"):
        choose_compile_vision(True, vision_trains=True, device_type="cuda")
