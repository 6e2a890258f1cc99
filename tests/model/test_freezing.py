"""What trains, what stays in eval, and LoRA: attached, merged, and gone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samtrain.model.freezing import apply_freezing, part_of, trainable_counts
from samtrain.model.lora import attach_lora, merged_for_export
from samtrain.model.options import LoraOptions, TrainablePartsOptions

LORA = TrainablePartsOptions(language_model="lora", lora=LoraOptions(r=4, lora_alpha=8))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (TrainablePartsOptions(), {"guidance"}),
        (TrainablePartsOptions(guidance=False, qformer=True), {"qformer"}),
        (TrainablePartsOptions(projection=True, language_model="full"), {"guidance", "projection", "language_model"}),
        (TrainablePartsOptions(vision=True), {"guidance", "vision"}),
    ],
)
def test_the_parts_asked_for_train_and_no_others(
    tiny_model: Any, make_batch: Any, options: TrainablePartsOptions, parts: set[str]
) -> None:
    model = tiny_model(random_guidance=True).train()
    apply_freezing(model, options)
    model(**make_batch([2, 3]).model_inputs()).loss_sum.backward()
    got = {part_of(n) for n, p in model.named_parameters() if p.grad is not None}
    assert got == parts
    counts = trainable_counts(model)
    assert {part for part, (trainable, _) in counts.items() if trainable} == parts
    assert sum(total for _, total in counts.values()) == sum(p.numel() for p in model.parameters())


def test_dropout_of_a_frozen_qformer_never_acts_and_of_a_trained_one_does(tiny_model: Any, make_batch: Any) -> None:
    batch = make_batch([2, 2]).model_inputs()
    for options, is_random in ((TrainablePartsOptions(), False), (TrainablePartsOptions(qformer=True), True)):
        model = tiny_model(random_guidance=True, dropout=0.5)
        apply_freezing(model, options)
        model.train()
        with torch.no_grad():
            first, second = (model(**batch).query_outputs for _ in range(2))
        assert torch.equal(first, second) is not is_random


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_frozen_language_model_recomputes_its_layers_and_keeps_its_dropout_off(
    tiny_model: Any, make_batch: Any, kind: str
) -> None:
    batch = make_batch([2, 3])
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(kind, random_guidance=True)
        apply_freezing(model, TrainablePartsOptions())
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        calls: list[int] = []
        model.language_model.get_decoder().layers[0].self_attn.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        model(**batch.model_inputs()).loss_sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (2 if checkpointing else 1)
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() < 1e-6, name


@pytest.mark.parametrize("kernels", ["materialised", "reference"])
def test_checkpointing_never_wraps_the_qformers_layers_which_run_twice(
    tiny_model: Any, make_batch: Any, kernels: str
) -> None:
    model = tiny_model(random_guidance=True, dropout=0.0, kernels=kernels)
    apply_freezing(model, TrainablePartsOptions(vision=True, qformer=True, language_model="full"))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        calls: dict[str, int] = {}
        hooks = [
            module.register_forward_pre_hook(lambda *_, n=name, calls=calls: calls.update({n: calls.get(n, 0) + 1}))
            for name, module in model.named_modules()
        ]
        model(**make_batch([2, 3]).model_inputs()).loss_sum.backward()
        for hook in hooks:
            hook.remove()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        twice = 2 if checkpointing else 1
        assert calls["language_model.model.layers.1.self_attn"] == calls["vision_model.encoder.layers.0.mlp"] == twice
        assert [calls[f"qformer.encoder.layer.{t}.attention"] for t in range(4)] == [1, 1, 2, 1]
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() < 1e-5, name


def test_unknown_parameter_names_belong_to_no_part() -> None:
    assert part_of("module.query_tokens") == "qformer"
    assert part_of("language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight") == "language_model"
    with pytest.raises(KeyError, match=r"'classifier.weight' belongs to no part"):
        part_of("classifier.weight")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_starts_as_nothing_trains_alone_and_merges_away(tiny_model: Any, make_batch: Any, kind: str) -> None:
    model = tiny_model(kind, random_guidance=True)
    plain = tiny_model(kind, random_guidance=True)
    batch = make_batch([2, 1]).model_inputs()
    before = model(**batch, return_logits=True).logits
    attach_lora(model, LORA.lora)
    apply_freezing(model, LORA)
    model.train()
    out = model(**batch, return_logits=True)
    assert (out.logits - before).abs().max() < 1e-6 or kind == "gpt2"  # GPT-2's own dropout acts: its part trains
    out.loss_sum.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(".lora_" in n or n.startswith("guidance.") for n in trained)
    assert any(n.startswith("language_model.") for n in trained)

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.eval()
    expected = model(**batch, return_logits=True).logits
    state: list[tuple[str, Tensor | None]] = [*model.state_dict().items(), ("elsewhere", None)]
    plain.load_state_dict(dict(merged_for_export(model, iter(state))), strict=True)
    assert (expected - before).abs().max() > 1e-2
    assert (plain(**batch, return_logits=True).logits - expected).abs().max() < 1e-5


def test_merging_without_lora_changes_nothing(tiny_model: Any) -> None:
    model: nn.Module = tiny_model()
    merged = dict(merged_for_export(model, model.state_dict().items()))
    assert merged.keys() == model.state_dict().keys()
    assert all(torch.equal(merged[n], t) for n, t in model.state_dict().items())
