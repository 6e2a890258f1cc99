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
from samtrain.model.live_bytes import LiveBytes, storage_bytes
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
    inputs = [v for v in batch.model_inputs().values() if isinstance(v, torch.Tensor)]
    inputs += list(vars(batch.image_groups).values())
    with LiveBytes(given=[*model.parameters(), *model.buffers(), *inputs]) as live:
        model(**batch.model_inputs()).loss_sum.backward()
    return live.peak + storage_bytes(inputs)


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
        ["model.train.language_model=full", "data.max_tokens=24"],  # weights, and so gradients, outweigh activations
    ],
    ids=["frozen", "checkpointing", "lora", "full", "full, one sample"],
)
def test_counted_activations_are_those_of_a_real_pass(tiny_recipe: Path, attention: str, what: list[str]) -> None:
    """Liger is left out: on a CPU only the count can have it."""
    overrides = [WIDE, f"model.attn_implementation={attention}", "model.liger=false", *what]
    recipe = load_recipe(tiny_recipe, overrides)
    batch = largest(recipe)
    assert counted(recipe, batch) == of_a_real_pass(recipe, batch)  # to the byte


def test_the_stand_in_keeps_what_pytorchs_flash_attention_keeps() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from samtrain.model.activations import _FlashAllocations

    query, key, value = (torch.zeros(1, 24, 4, 16, requires_grad=True) for _ in range(3))  # [B, T, H, D]

    def kept(run: Any) -> int:
        found: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run()
        assert out is not None
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    def ours() -> torch.Tensor:
        return _FlashAllocations.apply(query, key, value)

    def theirs() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
            )

    assert kept(ours) == kept(theirs) == 4 * query.nbytes + 24 * 4 * 4
    gradients = torch.autograd.grad(ours().sum(), (query, key, value))
    assert [gradient.shape for gradient in gradients] == [query.shape] * 3


def test_attention_without_a_mask_and_liger_hold_less(tiny_recipe: Path) -> None:
    """What a GPU runs by itself, against what it is told to run: eager keeps [H, T, T] of every layer, sdpa a mask."""
    batch = largest(load_recipe(tiny_recipe))
    by_choice = {}
    for attention in ("auto", "sdpa", "eager"):
        for liger in ("auto", "false"):
            recipe = load_recipe(tiny_recipe, [WIDE, f"model.attn_implementation={attention}", f"model.liger={liger}"])
            by_choice[attention, liger] = counted(recipe, batch)
    assert by_choice["auto", "false"] < by_choice["sdpa", "false"] < by_choice["eager", "false"]
    # silu(gate), 160 wide and float32, of each of four layers is not kept, nor what the norms make.
    assert by_choice["auto", "false"] - by_choice["auto", "auto"] > 4 * batch.num_tokens * 160 * 4


def test_checkpointing_holds_less(tiny_recipe: Path) -> None:
    plain, kept = planned(tiny_recipe, WIDE), planned(tiny_recipe, WIDE, "train.gradient_checkpointing=true")
    assert kept.by_workers[2].activations < plain.by_workers[2].activations
    assert "without gradient checkpointing" in plain.counted and "with gradient checkpointing" in kept.counted


def test_no_number_of_workers_changes_the_activations(tiny_recipe: Path) -> None:
    plan = planned(tiny_recipe, "launch.num_workers=3", "train.global_batch_size=6")
    assert sorted(plan.by_workers) == [1, 2, 3, 4, 8, 16, 32, 64]
    assert len({held.activations for held in plan.by_workers.values()}) == 1
    assert [row[0] for row in plan.rows()] == ["3 (recipe)", "1", "2", "4", "8", "16", "32", "64"]


def test_offload_moves_bytes_to_the_workers_hosts(tiny_recipe: Path) -> None:
    none, optimizer, everything = (
        planned(tiny_recipe, f"train.zero.offload={o}") for o in ("none", "optimizer", "all")
    )
    trainable = sum(p.numel for p in parameters_in(build_empty(load_recipe(tiny_recipe).model)) if p.is_trainable)
    assert none.host[2] == 12 * trainable / 2  # the checkpoint copy alone
    assert optimizer.host[2] == none.host[2] + 20 * trainable / 2
    assert everything.host[2] > optimizer.host[2]
    assert none.by_workers[2].total > optimizer.by_workers[2].total > everything.by_workers[2].total


def test_the_answer_is_the_smallest_number_that_fits_with_the_allowance(tiny_recipe: Path) -> None:
    plan = planned(tiny_recipe)
    made_up = {
        n: replace(held, weights=80e9 / n, gathered=0.0, activations=69.5e9) for n, held in plan.by_workers.items()
    }
    plan = replace(plan, by_workers=made_up)
    # 78 GB of 80 and 139 of 141 are there for 1.1 times what is predicted: 70.9 and 126.4 GB.
    assert [plan.smallest(size) for size in (48, 80, 141)] == [None, 64, 2]
    assert fits(made_up[2], 141) and not fits(made_up[1], 141)
    assert "48 GB: no number up to 64" in plan.answer() and "141 GB: 2." in plan.answer()


def test_the_command_says_what_it_is_and_what_it_is_not(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), "--local", "--dry-run"]) == 0
    assert "how many GPUs" not in capsys.readouterr().out
    assert main([str(tiny_recipe), "--local", "--dry-run", "--memory"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2 (recipe)" in out and "24, 40, 48, 80, 141 GB" in out
    assert "GPUs needed, at least, of each size: 24 GB: 1; 40 GB: 1;" in out
    assert "computed, not measured: no GPU has confirmed it" in out and "fragments of the allocator" in out
    assert "global_batch_size 4 would have to change for 8, 16, 32, 64 workers" in out
    assert not (tmp_path / "run").exists()


def test_the_plan_command_takes_it_too(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from samtrain.cli import app

    result = CliRunner().invoke(app, ["plan", str(tiny_recipe), "--memory", "launch.num_workers=1"])
    assert result.exit_code == 0 and "1 (recipe)" in result.output


def test_the_mini_recipes_parts_are_counted(shared_files: Path, tmp_path: Path) -> None:
    """A convolutional tower, LoRA, heads that share keys and values, eager attention: nothing is loaded."""
    mini = Path(__file__).resolve().parents[2] / "recipes" / "mini.yaml"
    overrides = [f"data.path={shared_files / 'data'}", "data.build=null", f"output_dir={tmp_path / 'run'}"]
    eager, sdpa, auto = (
        planned(mini, *overrides, *others)
        for others in ([], ["model.attn_implementation=sdpa"], ["model.attn_implementation=auto"])
    )
    held = eager.by_workers[2]
    assert 150e6 < held.weights < 400e6  # 135 M of SmolLM2, replicated, in bf16, and the rest
    assert auto.by_workers[2].activations < sdpa.by_workers[2].activations < held.activations
