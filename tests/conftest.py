"""A whole run in seconds, for tests that start one from outside: recipe, data and tokenizer."""

import textwrap
from pathlib import Path

import pytest


def _save_word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "<s>", "</s>", "what", "is", "it", "a", "cat", "dog", "red"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture(scope="session")
def shared_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a small data set: train, validation and test, of two images a sample."""
    import io

    from PIL import Image

    from samtrain.data.shards import ShardWriter

    folder = tmp_path_factory.mktemp("shared")
    _save_word_tokenizer(folder / "tokenizer")
    for split, number in (("train", 12), ("validation", 4), ("test", 4)):
        with ShardWriter(folder / "data" / split) as writer:
            for i in range(number):
                pictures = []
                for colour in ((255, 20 * i, 0), (0, 20 * i, 255)):
                    stream = io.BytesIO()
                    Image.new("RGB", (16, 16), colour).save(stream, "PNG")
                    pictures.append(stream.getvalue())
                question, answer = "what is it " * (1 + i % 3), "a red cat" if i % 2 else "a dog"
                key = f"{split}-{i:03d}"
                writer.write(key=key, task="naming", instruction=question, output=answer, images=pictures)
    return folder


@pytest.fixture
def tiny_recipe(shared_files: Path, tmp_path: Path) -> Path:
    """A recipe file of a whole but tiny run: two CPU workers, two steps."""
    values = f"""
        name: tiny
        description: a whole run in seconds
        output_dir: {tmp_path / "run"}
        launch: {{num_workers: 2, device: cpu}}
        model:
          vision:
            config: {{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
                      image_size: 16, patch_size: 8}}
          qformer:
            config: {{vocab_size: 16, hidden_size: 16, num_hidden_layers: 4, num_attention_heads: 2,
                      intermediate_size: 16, max_position_embeddings: 32}}
            num_query_tokens: 2
            max_text_tokens: 16
          language_model:
            config: {{model_type: llama, vocab_size: 16, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
                      num_attention_heads: 2, max_position_embeddings: 64}}
          tokenizer_name_or_path: {shared_files / "tokenizer"}
          qformer_tokenizer_name_or_path: {shared_files / "tokenizer"}
          guidance: {{initial_layer: 2, contextual_layer: 3}}
          train: {{qformer: true, projection: true}}
        data:
          path: {shared_files / "data"}
          image_size: 16
          max_tokens: 64
          max_images: 8
        train: {{max_steps: 2, global_batch_size: 4, precision: fp32, learning_rate: 1e-3}}
        generation: {{num_beams: 1, max_new_tokens: 4}}
        evaluation: {{splits: [test]}}
        tracking: {{tracking_uri: "sqlite:///{tmp_path / "mlflow.db"}", system_metrics: false}}
    """
    path = tmp_path / "tiny.yaml"
    path.write_text(textwrap.dedent(values))
    return path
