"""Predicted memory: what is counted on tensors without data, against the same pass on real ones; and who holds what."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from samtrain.core.batch import PackedBatch
from samtrain.data.mixture import open_training_set
from samtrain.data.preflight import largest_pack
from samtrain.engine.zero import DTYPES
from samtrain.launch.cli import main
from samtrain.launch.memory_plan import MemoryPlan, fits, parameters_in, plan_memory
from samtrain.model.activations import count_activations
from samtrain.model.build import build_empty, build_model, build_processor
from samtrain.model.live_bytes import LiveBytes
from samtrain.recipe import Recipe, load_recipe


def planned(path: Path, *overrides: str) -> MemoryPlan:
    return plan_memory(load_recipe(path, list(overrides)), emit=lambda event: None)


def largest(recipe: Recipe) -> PackedBatch:
    processor = build_processor(recipe.model, image_size=recipe.data.image_size)
    return largest_pack(open_training_set(recipe.data), processor, recipe.data)


def counted(recipe: Recipe, batch: PackedBatch) -> int:
    return count_activations(
        recipe.model,
        batch,
        dtype=DTYPES[recipe.train.precision],
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    ).num_bytes


def of_a_real_pass(recipe: Recipe, batch: PackedBatch) -> int:
    """Forward and backward on the CPU, every gradient given up as soon as it is there."""
    model = build_model(recipe.model, dtype=DTYPES[recipe.train.precision], seed=0).model.train()
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes(given=[*model.parameters(), *model.buffers()]) as live:
        model(**batch.model_inputs()).loss_sum.backward()
    given = [v for v in batch.model_inputs().values() if isinstance(v, torch.Tensor)]
    given += list(vars(batch.image_groups).values())
    return live.peak + sum(tensor.nbytes for tensor in given)


# Wide enough for activations to outweigh what is small and there once: tables of images, masks, positions.
WIDE = (
    "model.language_model.config={model_type: llama, vocab_size: 16, hidden_size: 64, intermediate_size: 160, "
    "num_hidden_layers: 4, num_attention_heads: 4, max_position_embeddings: 64}"
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "what",
    [
        [],
        ["train.gradient_checkpointing=true"],
        ["model.train.language_model=lora"],
        ["model.train.language_model=full", "train.precision=bf16"],
    ],
    ids=["frozen", "checkpointing", "lora", "full"],
)
def test_counted_activations_are_those_of_a_real_pass(tiny_recipe: Path, attention: str, what: list[str]) -> None:
    """Liger is left out: on a CPU only the count can have it."""
    overrides = [WIDE, f"model.attn_implementation={attention}", "model.liger=false", *what]
    recipe = load_recipe(tiny_recipe, overrides)
    batch = largest(recipe)
    # Equal but for copies that a real CPU makes inside an operation and a fake one does not know of.
    assert counted(recipe, batch) == pytest.approx(of_a_real_pass(recipe, batch), rel=0.05)
