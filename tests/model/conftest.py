"""Tiny models with random weights, and the batches they run on. Everything in float32 or float64, seconds to build."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from samtrain.core.batch import IGNORE_INDEX, ImageGroups, PackedBatch
from samtrain.model import SamMllmConfig, SamMllmForConditionalGeneration, SamMllmProcessor
from samtrain.model.processing import build_image_processor

VOCABULARY, IMAGE_TOKEN, QUERIES, IMAGE_SIZE = 60, 59, 3, 8


def text_config(kind: str = "llama") -> Any:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        return LlamaConfig(**common, **shape, num_key_value_heads=2, max_position_embeddings=256)
    if kind == "qwen2":
        return Qwen2Config(**common, **shape, num_key_value_heads=1, max_position_embeddings=256)
    if kind == "opt":
        return OPTConfig(
            **common, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
            max_position_embeddings=256,
        )  # fmt: skip
    return GPT2Config(**common, n_embd=16, n_layer=2, n_head=2, n_positions=256)


def config(kind: str = "llama", *, layers: int = 4, dropout: float = 0.1, **guidance: Any) -> SamMllmConfig:
    guidance = {"initial_layer": 3, "contextual_layer": 3, "max_images": 5} | guidance
    return SamMllmConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=IMAGE_SIZE,
            patch_size=4, initializer_range=0.2,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32, encoder_hidden_size=12, initializer_range=0.2, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ),
        text_config=text_config(kind),
        num_query_tokens=QUERIES,
        image_token_id=IMAGE_TOKEN,
        **guidance,
    )  # fmt: skip


def randomise(model: torch.nn.Module, *, seed: int = 1, scale: float = 0.3) -> None:
    """Give every parameter of `model` that is zero or one a random value, so that no path is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.add_(noise.to(parameter.dtype))


def word_tokenizer(words: list[str], *, special: dict[str, str], template: str) -> PreTrainedTokenizerFast:
    """One id for each word, in order; `template` puts special tokens around a text."""
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    around = [(token, vocabulary[token]) for token in special.values() if token in template]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


WORDS = [
    "a",
    "cat",
    "dog",
    "is",
    "in",
    "every",
    "picture",
    "what",
    "where",
    "the",
    "yes",
    "no",
    "left",
    "right",
    "top",
    "bottom",
    ".",
    "?",
]


def llm_tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return word_tokenizer(WORDS, special=special, template="<s> $A")


def qformer_tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return word_tokenizer(WORDS, special=special, template="[CLS] $A [SEP]")


@pytest.fixture
def make_processor() -> Callable[..., SamMllmProcessor]:
    """A processor of tiny word-level tokenizers; keyword arguments are the processor's."""

    def build(**kwargs: Any) -> SamMllmProcessor:
        image_processor = build_image_processor(image_size=IMAGE_SIZE, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
        kwargs = {"num_query_tokens": QUERIES} | kwargs
        return SamMllmProcessor(image_processor, llm_tokenizer(), qformer_tokenizer(), **kwargs)

    return build


@pytest.fixture
def tokenizer_folders(tmp_path: Path) -> dict[str, str]:
    """Saved tiny tokenizers, as options: tokenizer_name_or_path and qformer_tokenizer_name_or_path."""
    folders = {"tokenizer_name_or_path": "llm_tokenizer", "qformer_tokenizer_name_or_path": "text_tokenizer"}
    llm_tokenizer().save_pretrained(tmp_path / "llm_tokenizer")
    qformer_tokenizer().save_pretrained(tmp_path / "text_tokenizer")
    return {key: str(tmp_path / name) for key, name in folders.items()}


@pytest.fixture
def tiny_config() -> Callable[..., SamMllmConfig]:
    return config


@pytest.fixture
def tiny_model() -> Callable[..., SamMllmForConditionalGeneration]:
    """Build a tiny model from the keyword arguments of `config`; `random_guidance` gives A, B and the rest values.

    Attention dropout acts on the materialised path alone: with other `kernels` a model that trains needs `dropout=0`.
    """

    def build(
        kind: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        random_guidance: bool = False,
        seed: int = 0,
        kernels: Any = "auto",
        **kwargs: Any,
    ) -> SamMllmForConditionalGeneration:
        torch.manual_seed(seed)
        model = SamMllmForConditionalGeneration(config(kind, **kwargs))
        for part in (model.vision_model, model.qformer):
            randomise(part, scale=0.05)
        if random_guidance and model.guidance is not None:
            randomise(model.guidance)
        model.kernels = kernels
        return model.to(dtype).eval()

    return build


@pytest.fixture
def make_batch() -> Callable[..., PackedBatch]:
    """A pack of samples with the given numbers of images (prefix layout, random text, answer of 3 tokens)."""

    def build(counts: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PackedBatch:
        g = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        borders, images = [0], [0]
        longest = 6
        text_ids = torch.randint(1, 40, (len(counts), longest), generator=g)
        text_mask = torch.ones_like(text_ids)
        for s, count in enumerate(counts):
            prompt = torch.randint(3, VOCABULARY - 1, (3 + s % 3,), generator=g).tolist()
            answer = torch.randint(3, VOCABULARY - 1, (3,), generator=g).tolist()
            sample = [IMAGE_TOKEN] * (QUERIES * count) + prompt + answer
            ids += sample
            labels += [IGNORE_INDEX] * (len(sample) - 3) + answer
            positions += range(len(sample))
            borders.append(len(ids))
            images.append(images[-1] + count)
            keep = longest - s % 3
            text_mask[s, keep:] = 0
            text_ids[s, keep:] = 0
        return PackedBatch(
            input_ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            position_ids=torch.tensor(positions),
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            pixel_values=torch.randn(images[-1], 3, IMAGE_SIZE, IMAGE_SIZE, generator=g).to(dtype),
            qformer_input_ids=text_ids,
            qformer_attention_mask=text_mask,
            image_groups=ImageGroups.from_counts(counts),
            image_token_id=IMAGE_TOKEN,
            num_query_tokens=QUERIES,
            keys=tuple(f"sample-{s}" for s in range(len(counts))),
            num_label_tokens=3 * len(counts),
        ).validate()

    return build
