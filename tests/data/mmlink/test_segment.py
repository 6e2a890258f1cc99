"""Cut-outs: the thing, all of it, without a rim of its old background; by every segmenter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.options import Choice, GrabCutOptions, SamOptions, U2netOptions
from samtrain.data.mmlink.pictures import standing_out
from samtrain.data.mmlink.records import Rejected
from samtrain.data.mmlink.segment import Segmenter, build_segmenter
from samtrain.data.mmlink.segment.cutout import cut_out, iou
from samtrain.data.mmlink.segment.u2net import PACKAGED, model_path

Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def u2net() -> Segmenter:
    try:
        model_path(PACKAGED)
    except ConfigError as error:
        pytest.skip(str(error))
    return build_segmenter(Choice("u2net", U2netOptions()))


@pytest.fixture(scope="module")
def tiny_sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Segment-Anything model with random weights, saved as transformers saves one."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    torch.manual_seed(0)
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8,
            mlp_dim=16, window_size=4, global_attn_indexes=[0], num_pos_feats=4,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=8, image_size=64, patch_size=8, mask_input_channels=4, image_embedding_size=8
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=8, mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(folder)
    size = {"longest_edge": 64}
    SamProcessor(SamImageProcessor(size=size, pad_size={"height": 64, "width": 64})).save_pretrained(folder)
    return folder


def test_grabcut_finds_a_thing_on_a_plain_ground(thing: Draw) -> None:
    for number in range(4):
        cut = cut_out(thing(number, 0), build_segmenter(Choice("grabcut", GrabCutOptions())), own_alpha=False)
        assert cut.agreement is not None and cut.agreement > 0.93
        assert cut.image.mode == "RGBA"


def test_u2net_finds_a_thing_on_a_photograph(u2net: Segmenter, thing: Draw, photograph: Draw) -> None:
    scores = []
    for number in range(4):
        ground = photograph(number, size=(200, 200)).filter(ImageFilter.GaussianBlur(20))
        shape = thing(number, 0, side=120)
        ground.paste(shape, (40, 40), shape)
        truth = np.zeros((200, 200), bool)
        truth[40:160, 40:160] = np.asarray(shape)[..., 3] > 127
        found = u2net(ground)
        assert found.shape == (200, 200) and 0 <= found.min() <= found.max() <= 1
        scores.append(iou(found > 0.5, truth))
    assert np.median(scores) > 0.85, scores


def test_segmenting_twice_gives_the_same_bits(u2net: Segmenter, thing: Draw) -> None:
    image = thing(3, 0, alpha=False)
    assert np.array_equal(u2net(image), u2net(image))


def test_no_colour_of_the_old_ground_is_left_at_the_edge(thing: Draw) -> None:
    """A soft-edged disc on pure green: green must not ring it afterwards."""
    soft = Image.new("L", (100, 100), 0)
    soft.paste(255, (25, 25, 75, 75))
    soft = soft.filter(ImageFilter.GaussianBlur(2))
    picture = Image.composite(
        Image.new("RGB", (100, 100), (200, 30, 30)), Image.new("RGB", (100, 100), (0, 255, 0)), soft
    )
    sureness = np.asarray(soft, np.float32) / 255
    cut = np.asarray(cut_out(picture, lambda image: sureness, own_alpha=False).image).astype(int)
    visible = cut[cut[..., 3] > 60]
    assert visible[:, 1].max() < 120 and visible[:, 0].min() > 120


def test_specks_far_from_the_thing_are_dropped_and_parts_of_it_are_kept() -> None:
    sureness = np.zeros((100, 100), np.float32)
    sureness[20:60, 20:60] = 1
    sureness[65:80, 20:60] = 1  # a second part
    sureness[95:98, 95:98] = 1  # a speck
    cut = cut_out(Image.new("RGB", (100, 100), "red"), lambda image: sureness, own_alpha=False)
    assert cut.image.size == (40, 60)


def test_eyes_belong_to_the_thing_and_holes_show_what_is_behind_it() -> None:
    picture = Image.new("RGB", (120, 120), (60, 90, 140))
    picture.paste((220, 60, 40), (20, 20, 100, 100))
    picture.paste((255, 255, 255), (35, 35, 45, 45))  # an eye that the segmenter took for ground
    picture.paste((60, 90, 140), (60, 60, 85, 85))  # the old ground, seen through a hole
    sureness = np.zeros((120, 120), np.float32)
    sureness[20:100, 20:100] = 1
    sureness[35:45, 35:45] = sureness[60:85, 60:85] = 0
    alpha = np.asarray(cut_out(picture, lambda image: sureness, own_alpha=False).image.getchannel("A"))
    assert (alpha[15:25, 15:25] == 255).all() and not alpha[42:63, 42:63].any()


def test_nothing_found_is_a_rejection() -> None:
    with pytest.raises(Rejected, match="nothing was found"):
        cut_out(Image.new("RGB", (50, 50)), lambda image: np.zeros((50, 50), np.float32), own_alpha=False)


def test_own_alpha_is_taken_as_it_is(thing: Draw) -> None:
    def never(image: Image.Image) -> np.ndarray:
        raise AssertionError("not asked")

    picture = thing(5, 0)
    cut = cut_out(picture, never, own_alpha=True)
    assert cut.agreement == 1.0
    assert cut.area == pytest.approx((np.asarray(picture)[..., 3] > 127).mean(), abs=0.01)


def test_the_ground_under_cut_out_art_differs_from_its_edge() -> None:
    for colour in ((255, 255, 255), (10, 10, 10), (128, 160, 128)):
        image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        image.paste((*colour, 255), (10, 10, 30, 30))
        assert sum(abs(a - b) for a, b in zip(standing_out(image), colour)) > 100
    image.paste((20, 20, 20, 255), (10, 10, 30, 30))
    image.paste((255, 255, 255, 255), (14, 14, 20, 20))  # an eye, which white would make a hole
    assert standing_out(image) != (255, 255, 255)


def test_a_local_segment_anything_model_segments_by_its_folder_s_name(tiny_sam: Path, thing: Draw) -> None:
    segmenter = build_segmenter(Choice("sam", SamOptions(model=str(tiny_sam), min_area=0, max_area=1)))
    for size in ((96, 96), (120, 50)):
        image = thing(1, 0, alpha=False).resize(size)
        found = segmenter(image)
        assert found.shape == size[::-1] and found.dtype == np.float32
        assert 0 <= found.min() <= found.max() <= 1
        assert np.array_equal(found, segmenter(image))


def test_models_that_are_not_there_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"segment\.model = '.*nothing': no such file"):
        build_segmenter(Choice("u2net", U2netOptions(model=str(tmp_path / "nothing"))))
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no onnx")
    with pytest.raises(ConfigError, match="is no ONNX model"):
        build_segmenter(Choice("u2net", U2netOptions(model=str(bad))))
    with pytest.raises(ConfigError, match=r"segment\.model = .*cannot be loaded.*hub name or a local folder"):
        build_segmenter(Choice("sam", SamOptions(model=str(tmp_path))))
