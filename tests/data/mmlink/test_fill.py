"""Backgrounds: every way fills all of the canvas and leaves the things as they are."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.compose import compose_scene
from samtrain.data.mmlink.fill import Background, build_filler
from samtrain.data.mmlink.fill.inpaint import METHODS, Inpainter
from samtrain.data.mmlink.fill.photographs import contrast
from samtrain.data.mmlink.fill.plain import on_plain
from samtrain.data.mmlink.fill.plates import clean_plate
from samtrain.data.mmlink.options import (
    FILLERS,
    Choice,
    ComposeOptions,
    DiffusersFillOptions,
    PhotographFillOptions,
    PlatesOptions,
)

Draw = Callable[..., Image.Image]


@pytest.fixture
def things(thing: Draw) -> Image.Image:
    drawn = compose_scene([thing(1, 0), thing(2, 0)], [True] * 2, ComposeOptions(canvas=96), np.random.default_rng(0))
    return drawn.things


@pytest.mark.parametrize("kind", ["generated", "photographs", "telea", "patchmatch"])
def test_things_stay_and_the_rest_is_background(kind: str, things: Image.Image, photograph: Draw) -> None:
    fill = build_filler(Choice(kind, FILLERS[kind]()))
    background = Background("grey rocks", photograph(1))
    picture = fill(things, background, np.random.default_rng(4))
    assert picture.mode == "RGB" and picture.size == things.size
    before, after = np.asarray(things).astype(int), np.asarray(picture).astype(int)
    solid = before[..., 3] == 255
    assert (before[solid][:, :3] == after[solid]).all()
    assert len(np.unique(after[before[..., 3] == 0], axis=0)) > 1 or kind == "generated"
    again = fill(things, background, np.random.default_rng(4))
    assert np.array_equal(np.asarray(again), after)


def test_the_part_of_the_photograph_is_one_where_things_stand_out(photograph: Draw) -> None:
    """Half of the plate has the thing's own colour."""
    things = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    things.paste((200, 40, 40, 255), (20, 20, 44, 44))
    plate = Image.new("RGB", (640, 320), (200, 40, 40))
    plate.paste((40, 40, 200), (320, 0, 640, 320))
    fill = build_filler(Choice("photographs", PhotographFillOptions(crops=24, min_crop=0.3)))
    for seed in range(5):
        picture = fill(things, Background("", plate), np.random.default_rng(seed))
        assert contrast(things, picture) >= 18


def test_contrast_is_that_of_the_least_visible_thing() -> None:
    things = Image.new("RGBA", (80, 40), (0, 0, 0, 0))
    things.paste((250, 250, 250, 255), (10, 10, 30, 30))
    things.paste((100, 100, 100, 255), (50, 10, 70, 30))
    mask = Image.new("P", (80, 40), 0)
    mask.paste(1, (10, 10, 30, 30))
    mask.paste(2, (50, 10, 70, 30))
    picture = Image.new("RGB", (80, 40), (110, 110, 110))
    assert contrast(things, picture, mask) == pytest.approx(10, abs=1)
    assert contrast(things, picture) == pytest.approx(10, abs=1)


@pytest.mark.parametrize("method", METHODS)
def test_inpainting_fills_holes_alone_and_like_their_surroundings(method: str) -> None:
    columns = np.linspace(40, 200, 60, dtype=np.uint8)
    pixels = np.repeat(np.repeat(columns[None, :, None], 50, axis=0), 3, axis=2)
    holes = np.zeros((50, 60), bool)
    holes[20:32, 22:36] = True
    broken = pixels.copy()
    broken[holes] = (255, 0, 255)
    filled = Inpainter(method)(broken, holes)
    assert np.array_equal(filled[~holes], pixels[~holes])
    assert np.abs(filled.astype(int) - pixels)[holes].mean() < 15
    assert np.array_equal(Inpainter(method)(broken, holes), filled)
    assert np.array_equal(Inpainter(method)(broken, np.zeros_like(holes)), broken)


def test_black_bars_are_no_background(photograph: Draw) -> None:
    framed = Image.new("RGB", (400, 340), (3, 3, 3))
    framed.paste(photograph(1, size=(400, 300)), (0, 20))
    found = clean_plate(framed, None, PlatesOptions()).image
    assert found.width == 400 and 290 <= found.height <= 300 and np.asarray(found).max(axis=2).min() > 24
    night = Image.new("RGB", (400, 340), (3, 3, 3))
    night.paste((250, 250, 240), (180, 100, 200, 120))
    assert clean_plate(night, None, PlatesOptions()).image.size == night.size


def test_a_plate_loses_what_stands_out_and_only_that(photograph: Draw) -> None:
    clean = photograph(2, size=(200, 150))
    spoiled = clean.copy()
    spoiled.paste((255, 0, 255), (80, 60, 110, 90))
    sureness = np.zeros((150, 200), np.float32)
    sureness[60:90, 80:110] = 1
    plate = clean_plate(spoiled, lambda image: sureness, PlatesOptions(grow=4))
    assert 0.03 < plate.removed < 0.1
    difference = np.abs(np.asarray(plate.image).astype(int) - np.asarray(clean))
    assert difference.mean() < 2 and difference[60:90, 80:110].mean() < 25
    whole = clean_plate(spoiled, lambda image: np.ones(image.size[::-1], np.float32), PlatesOptions())
    assert whole.removed == 0 and np.array_equal(np.asarray(whole.image), np.asarray(spoiled))


def test_icons_lie_on_a_light_colour(things: Image.Image) -> None:
    picture = np.asarray(on_plain(things, np.random.default_rng(0)))
    ground = picture[np.asarray(things)[..., 3] == 0]
    assert len(np.unique(ground, axis=0)) == 1 and ground.min() >= 200


def _tiny_pipeline(folder: Path) -> None:
    """A Stable Diffusion inpainting pipeline with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "grey": 3, "rocks": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=8,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    StableDiffusionInpaintPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed (extra mmlink)")
def test_a_local_diffusers_pipeline_paints_around_the_things(tmp_path: Path, things: Image.Image) -> None:
    _tiny_pipeline(tmp_path)
    options = DiffusersFillOptions(model=str(tmp_path), size=64, steps=2)
    fill = build_filler(Choice("diffusers", options))
    picture = fill(things, Background("grey rocks"), np.random.default_rng(1))
    before, after = np.asarray(things).astype(int), np.asarray(picture).astype(int)
    assert (before[before[..., 3] == 255][:, :3] == after[before[..., 3] == 255]).all()
    assert after[before[..., 3] == 0].std() > 1
    assert np.array_equal(np.asarray(fill(things, Background("grey rocks"), np.random.default_rng(1))), after)
    assert not np.array_equal(np.asarray(fill(things, Background("grey rocks"), np.random.default_rng(2))), after)


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed (extra mmlink)")
def test_a_folder_that_is_no_pipeline_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fill\.model = .* cannot be loaded"):
        build_filler(Choice("diffusers", DiffusersFillOptions(model=str(tmp_path))))
