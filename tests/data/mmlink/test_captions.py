"""Captions: the source's own words, or a local InstructBLIP."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.captions import LabelCaptioner, build_captioner
from samtrain.data.mmlink.options import Choice, InstructBlipOptions

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "a", "red", "fox", "short", "image", "description", "."]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def tiny_instructblip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
        ).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=32, encoder_hidden_size=8,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=64,
        ).to_dict(),
        num_query_tokens=2,
        image_token_index=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("instructblip")
    InstructBlipForConditionalGeneration(config).save_pretrained(folder)
    processor = InstructBlipProcessor(
        BlipImageProcessor(size={"height": 16, "width": 16}), _tokenizer(), _tokenizer(), num_query_tokens=2
    )
    processor.save_pretrained(folder)
    return folder


def test_labels_are_the_sources_own_words() -> None:
    image = Image.new("RGB", (4, 4))
    assert LabelCaptioner()(image, name="a fox", caption="a red fox asleep") == "a red fox asleep"
    assert LabelCaptioner()(image, name="a fox", caption="") == "a fox"


def test_a_local_instructblip_captions_by_its_folder_s_name(
    tiny_instructblip: Path, thing: Callable[..., Image.Image]
) -> None:
    options = InstructBlipOptions(model=str(tiny_instructblip), max_new_tokens=4, num_beams=2)
    caption = build_captioner(Choice("instructblip", options))
    image = thing(1, 0, alpha=False)
    text = caption(image, name="a fox", caption="")
    assert text and set(text.split()) <= set(WORDS) and len(text.split()) <= 8
    assert caption(image, name="a fox", caption="") == text


def test_a_folder_that_is_no_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"captions\.model = .* cannot be loaded"):
        build_captioner(Choice("instructblip", InstructBlipOptions(model=str(tmp_path))))
