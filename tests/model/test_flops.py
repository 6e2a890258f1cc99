"""The counts behind MFU agree with PyTorch's own counter and with the published shapes."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samtrain.core.batch import ImageGroups
from samtrain.model import SamMllmConfig, SamMllmForConditionalGeneration
from samtrain.model.flops import FlopCounter
from samtrain.model.options import TrainablePartsOptions

FROZEN = TrainablePartsOptions(guidance=False)
TEXT = 6
SAMPLE = {"num_tokens": 20, "num_labels": 5, "num_images": 3, "num_text_tokens": TEXT}


def tiny_config(**guidance: str) -> SamMllmConfig:
    vision = {
        "model_type": "instructblip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    qformer = {
        "model_type": "instructblip_qformer",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
        "vocab_size": 50,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    return SamMllmConfig(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=5,
        image_token_id=99,
        initial_layer=2,
        contextual_layer=3,
        **guidance,
    )


@pytest.mark.parametrize("kernels", ["materialised", "reference"])
@pytest.mark.parametrize("mode", ["none", "others", "all", "own"])
def test_the_two_stream_formula_equals_a_counted_run(mode: str, kernels: Any) -> None:
    """And what each path does besides: MFU counts none of it."""
    guidance = {"guidance_mode": "none"} if mode == "none" else {"guidance_context": mode}
    config = tiny_config(**guidance)
    # Eager: PyTorch's counter does not know the CPU's fused attention.
    model = SamMllmForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    counter = FlopCounter(config, FROZEN, image_size=28)
    model.kernels = kernels
    texts = torch.zeros(1, TEXT, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.language_projection(
            model.encode_images(torch.zeros(3, 3, 28, 28), ImageGroups.from_counts([3]), texts, torch.ones_like(texts))
        )
    flops = counter.sample(**SAMPLE)
    one_projection = 2.0 * 5 * 48 * 64 * 3  # counted twice by the formula: forward, and backward towards the input
    patches, kv = 5, 2.0 * 2 * 5 * 32 * 48
    extra = 0.0
    if mode != "none":
        # Images mixed, over all contexts; rows of the W stream in layers 1 and 3.
        pairs, rows = {"others": (9, [3, 3]), "all": (3, [1, 3]), "own": (3, [3, 3])}[mode]
        extra += 2.0 * 2 * 3 * (5 + TEXT) * 48**2 + 2.0 * 3 * patches * 32  # A, B, patch scores
        if kernels == "materialised":
            extra += 2.0 * pairs * patches * 32 + kv * sum(rows)  # mixing features, projecting them
        else:
            extra += 2 * (2.0 * 2 * pairs * patches * 48)  # mixing keys and values in two layers
    assert counted.get_total_flops() == pytest.approx(flops.vision + flops.qformer - one_projection + extra, rel=1e-3)


def test_published_shapes_have_their_known_sizes() -> None:
    llama_7b = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2}
    config = SamMllmConfig(
        guidance_mode="none",
        vision_config={"model_type": "instructblip_vision_model"},
        text_config=llama_7b | {"num_attention_heads": 32, "vocab_size": 32000},
    )
    counter = FlopCounter(config, FROZEN, image_size=224)
    one = counter.sample(num_tokens=1, num_labels=0, num_images=1, num_text_tokens=1)
    # ViT-g: 39 layers of 12 x 1408^2 (roughly) weights over 257 patches, and their attention.
    assert one.vision == pytest.approx(521e9, rel=0.01)
    layer = 2.0 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert one.language_model == pytest.approx(2 * layer, rel=0.001)


def test_what_trains_decides_how_often_passes_count() -> None:
    def total(trains: TrainablePartsOptions) -> float:
        return FlopCounter(tiny_config(), trains, image_size=28).sample(**SAMPLE).language_model

    frozen, guided = total(FROZEN), total(TrainablePartsOptions())
    full = total(TrainablePartsOptions(language_model="full"))
    assert guided == pytest.approx(2 * frozen)
    assert full == pytest.approx(3 * frozen)
