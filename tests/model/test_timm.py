"""Checkpoints of timm as vision towers, through transformers' wrapper: loading, training, saving.

timm needs a torchvision of torch's own build, which machines without a GPU may not have; there these are skipped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from samtrain.core.batch import ImageGroups
from samtrain.model import SamMllmForConditionalGeneration, build_model, build_processor
from samtrain.model.options import ModelOptions
from samtrain.model.vision import patch_features

try:
    import timm
except (ImportError, RuntimeError) as error:
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

SIZE = 64
TOKENS = ("vit_tiny_patch16_224", {"img_size": SIZE, "depth": 2})
MAP = ("resnet10t", {})


def options(tokenizers: dict[str, str], tower: Path) -> ModelOptions:
    values: dict[str, Any] = {
        "vision": {"model_name_or_path": str(tower)},
        "qformer": {
            "num_query_tokens": 3,
            "max_text_tokens": 16,
            "config": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
                       "intermediate_size": 24, "max_position_embeddings": 32},
        },
        "language_model": {
            "config": {"model_type": "llama", "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24,
                       "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256},
        },
        "guidance": {"initial_layer": 2, "contextual_layer": 3},
        "train": {"vision": True},
    }  # fmt: skip
    return ModelOptions.model_validate({**tokenizers, **values})


@pytest.mark.parametrize(("name", "arguments"), [TOKENS, MAP])
def test_a_timm_checkpoint_is_loaded_trains_and_is_saved_with_the_model(
    tokenizer_folders: dict[str, str], tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(3)
    theirs = timm.create_model(name, **arguments).eval()
    save_for_hf(theirs, str(tmp_path / "tower"), model_args=arguments)
    opts = options(tokenizer_folders, tmp_path / "tower")
    processor = build_processor(opts, image_size=SIZE)
    assert tuple(processor.image_processor.image_mean) == theirs.pretrained_cfg["mean"]
    model, report, _ = build_model(opts, dtype=torch.float32, seed=7)
    vision = report.parts["vision"]
    assert not vision.missing and all("head" in n or "fc" in n.split(".") for n in vision.unexpected)

    pixels = torch.rand(3, 3, SIZE, SIZE)
    output = model.vision_model.eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(output, theirs.forward_features(pixels))
    assert patch_features(model.vision_model, pixels).shape[1] > 1

    text = processor.encode(key="k", instruction="a b", output="c", num_images=3)
    out = model.train()(
        input_ids=torch.tensor(text.input_ids), labels=torch.tensor(text.labels),
        cu_seqlens=torch.tensor([0, text.num_tokens], dtype=torch.int32), pixel_values=pixels,
        image_groups=ImageGroups.from_counts([3]), qformer_input_ids=torch.tensor([text.qformer_input_ids]),
    )  # fmt: skip
    out.loss_sum.backward()
    without = [n for n, p in model.vision_model.named_parameters() if p.requires_grad and p.grad is None]
    assert torch.isfinite(out.loss) and not without

    model.eval().save_pretrained(tmp_path / "model")
    loaded = SamMllmForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(patch_features(loaded.vision_model, pixels), patch_features(model.vision_model, pixels))
