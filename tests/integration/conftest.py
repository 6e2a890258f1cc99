"""A whole run in miniature: real shards of real JPEGs, a random model of the real shape, tokenizers made here."""

import io
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from samtrain.data.shards import ShardWriter

COLOURS = ("red", "green", "blue", "orange")
QUESTION = "Which colour do all pictures share ?"
WORDS = [*dict.fromkeys([*QUESTION.split(), "They", "Every", "picture", "has", "a", "circle", *COLOURS])]


def picture(colour: str, generator: random.Random) -> bytes:
    image = Image.new("RGB", (40, 40), "white")
    x, y = generator.randint(2, 16), generator.randint(2, 16)
    ImageDraw.Draw(image).ellipse((x, y, x + 20, y + 20), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def save_tokenizer(folder: Path, *, special: dict[str, str], template: str) -> str:
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    around = [(token, vocabulary[token]) for token in special.values() if token in template]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=around)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data/{train,validation,test} and two tokenizers."""
    folder = tmp_path_factory.mktemp("world")
    generator = random.Random(0)
    for split, count in {"train": 40, "validation": 6, "test": 8}.items():
        with ShardWriter(folder / "data" / split, max_samples_per_shard=16) as writer:
            for i in range(count):
                colour = generator.choice(COLOURS)
                images = [picture(colour, generator) for _ in range(generator.randint(1, 4))]
                output = f"They share {colour} ?" if i % 2 else f"Every picture has a {colour} circle"
                writer.write(key=f"{split}-{i:03d}", task="colour", instruction=QUESTION, output=output, images=images)
    special = {"unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    save_tokenizer(folder / "llm-tokenizer", special=special, template="<s> $A")
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    save_tokenizer(folder / "qformer-tokenizer", special=special, template="[CLS] $A [SEP]")
    return folder


@pytest.fixture
def write_recipe(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of a tiny model for the world's data; keyword arguments replace keys of `train`."""

    def write(*, output: str = "run", **train: Any) -> Path:
        shape = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        values = {
            "name": "tiny",
            "output_dir": str(tmp_path / "runs" / output),
            "launch": {"num_workers": 2, "device": "cpu"},
            "model": {
                "vision": {
                    "config": {"model_type": "instructblip_vision_model", "hidden_size": 24, "image_size": 32}
                    | {"patch_size": 8, **shape}
                },
                "qformer": {
                    "num_query_tokens": 4,
                    "max_text_tokens": 16,
                    "config": {"model_type": "instructblip_qformer", "hidden_size": 32, "vocab_size": 64, **shape}
                    | {"encoder_hidden_size": 24, "num_hidden_layers": 4},
                },
                "language_model": {"config": {"model_type": "llama", "hidden_size": 32, "vocab_size": 64, **shape}},
                "tokenizer_name_or_path": str(world / "llm-tokenizer"),
                "qformer_tokenizer_name_or_path": str(world / "qformer-tokenizer"),
                "guidance": {"initial_layer": 2, "contextual_layer": 3, "order_embedding": True},
                "train": {"qformer": True, "projection": True, "language_model": "lora"},
            },
            "data": {"path": str(world / "data"), "image_size": 32, "max_tokens": 128, "max_images": 8},
            "train": {"max_steps": 6, "global_batch_size": 8, "learning_rate": 3e-3, "precision": "fp32"}
            | {"save_steps": 2, "save_total_limit": 3, "timeout_seconds": 120.0}
            | train,
            "generation": {"max_new_tokens": 8, "num_beams": 2},
            "evaluation": {"splits": ["test"], "batch_size": 3, "num_examples": 4, "context_gain": True},
            "tracking": {"system_metrics": False},
        }
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def environment() -> dict[str, str]:
    """Without what another tracker or cluster may have set."""
    dropped = ("MLFLOW_", "RAY_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m samtrain.launch ...` to its end."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "samtrain.launch", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment(), cwd=tmp_path)

    return run


@pytest.fixture
def start_launch(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m samtrain.launch ...` in a process group of its own."""

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-m", "samtrain.launch", *map(str, arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment(), cwd=tmp_path, start_new_session=True, **pipes)

    return start


@pytest.fixture
def samtrain_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `samtrain ...` to its end."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "samtrain.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), cwd=tmp_path)

    return run
