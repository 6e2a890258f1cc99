"""A tiny model with random weights, with tokenizers trained on a few sentences; nothing is downloaded."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from samtrain.model import SamMllmConfig, SamMllmForConditionalGeneration, SamMllmProcessor

SENTENCES = [
    "What is in both pictures? It is a red cat, a dog, or an owl.",
    "Where is the bird? On the left, at the top.",
]


def word_tokenizer(**special):
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["[PAD]", "[UNK]", *special.values()]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=list(dict.fromkeys(names))))
    if "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)


def make_processor(**arguments):
    side = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    tokenizer = word_tokenizer(bos_token="<s>", eos_token="</s>")
    return SamMllmProcessor(image_processor, tokenizer, word_tokenizer(), num_query_tokens=3, **arguments)


def make_model(processor, *, tie=False, seed=0):
    torch.manual_seed(seed)
    vocabulary = len(processor.tokenizer)
    config = SamMllmConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=4, initializer_range=0.2,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(processor.qformer_tokenizer), hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=32, encoder_hidden_size=12, initializer_range=0.2,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=2, eos_token_id=3, pad_token_id=0,
            tie_word_embeddings=tie, initializer_range=0.3,
        ),
        num_query_tokens=3, image_token_id=processor.image_token_id, initial_layer=3, contextual_layer=3,
        eos_token_id=processor.eos_token_id, pad_token_id=processor.pad_token_id, initializer_range=0.2,
    )  # fmt: skip
    model = SamMllmForConditionalGeneration(config)
    with torch.no_grad():  # guidance starts at zero; give it something to say
        for parameter in model.guidance.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def model(processor):
    return make_model(processor)


@pytest.fixture
def build_model(processor):
    return lambda **arguments: make_model(processor, **arguments)


@pytest.fixture
def picture():
    def draw(seed, size=(8, 8)):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())

    return draw


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
