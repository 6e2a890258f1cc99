"""Every attention keeps the samples of a pack apart and computes the same; `auto` takes the fastest that can run.

FlexAttention refuses backward passes on a CPU, though its mathematics has one: tests let it, uncompiled.
"""

import importlib.util
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig

from samtrain.core.errors import ConfigError
from samtrain.model.attention import choose_attention, packed_attention
from samtrain.model.freezing import apply_freezing
from samtrain.model.options import TrainablePartsOptions

EVERYTHING = TrainablePartsOptions(vision=True, qformer=True, projection=True, language_model="full")


@pytest.fixture
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention as flex

    monkeypatch.setattr(flex, "_validate_device", lambda *ignored: None)
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training, **kwargs: flex.flex_attention(query, key, value, **kwargs),
    )


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.usefixtures("uncompiled_flex")
def test_flex_and_sdpa_give_the_same_outputs_and_gradients(
    tiny_model: Any, make_batch: Any, kind: str, is_checkpointed: bool
) -> None:
    batch = make_batch([2, 0, 30, 12])  # 152 tokens: more than one block of the mask
    assert batch.num_tokens > 128
    seen = []
    for attention in ("sdpa", "flex_attention"):
        model = tiny_model(kind, random_guidance=True, dropout=0.0, max_images=30).train()
        model.language_model.set_attn_implementation(attention)
        apply_freezing(model, EVERYTHING)
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        out = model(**batch.model_inputs(), return_logits=True)
        out.loss_sum.backward()
        seen.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(seen[0]) == len(seen[1]) > 50
    for sdpa, flex in zip(*seen):
        torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=2e-5)  # float32 sums in another order


def test_the_block_mask_is_the_dense_one_and_skips_other_samples() -> None:
    borders = torch.tensor([0, 100, 130, 400, 401, 640], dtype=torch.int32)
    arguments: dict[str, Any] = {"max_seqlen": None, "num_tokens": 640, "dtype": torch.float32}
    dense = packed_attention(borders, attn_implementation="sdpa", **arguments)["attention_mask"]
    blocks = packed_attention(borders, attn_implementation="flex_attention", **arguments)["attention_mask"]
    q, k = torch.meshgrid(torch.arange(640), torch.arange(640), indexing="ij")
    assert torch.equal(blocks.mask_mod(0, 0, q, k), dense[0, 0] == 0)
    any_visible = (dense[0, 0] == 0).view(5, 128, 5, 128).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), any_visible) and any_visible.sum() == 10  # of 15 causal ones


def test_packs_of_any_length_share_two_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first length, and every other one. After eight PyTorch would go on uncompiled, with [T, T] scores."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter)
    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *states, training, **kwargs: compiled(*states, **kwargs)
    )
    for length in (200, 300, 130, 640, 1000):
        arguments: dict[str, Any] = {"max_seqlen": None, "num_tokens": length, "dtype": torch.float32}
        borders = torch.tensor([0, 50, length], dtype=torch.int32)
        block_mask = packed_attention(borders, attn_implementation="flex_attention", **arguments)["attention_mask"]
        dense = packed_attention(borders, attn_implementation="sdpa", **arguments)["attention_mask"]
        states = torch.randn(3, 1, 2, length, 16)
        found, _ = integration.flex_attention_forward(torch.nn.Module().eval(), *states, block_mask)
        expected = torch.nn.functional.scaled_dot_product_attention(*states, dense)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-4, atol=2e-6)
    assert counter.frame_count == 2


LLAMA = LlamaConfig()


@pytest.mark.parametrize(
    ("asked", "config", "device", "has_flash", "expected"),
    [
        ("auto", LLAMA, "cuda", True, "flash_attention_2"),
        ("auto", LLAMA, "cuda", False, "flex_attention"),
        ("auto", LlamaConfig(attention_dropout=0.1), "cuda", False, "sdpa"),
        ("auto", GPT2Config(), "cuda", False, "sdpa"),
        ("auto", LLAMA, "cpu", True, "sdpa"),
        ("eager", LLAMA, "cuda", True, "eager"),
        ("flex_attention", LLAMA, "cuda", True, "flex_attention"),
        ("flex_attention", LLAMA, "cpu", True, "flex_attention, but it needs a GPU and this runs on cpu"),
        ("flash_attention_2", LLAMA, "cpu", True, "flash_attention_2, but it needs a GPU"),
        ("flash_attention_2", LLAMA, "cuda", False, "flash_attention_2, but flash-attn is not installed"),
        ("flex_attention", GPT2Config(), "cuda", False, "transformers has none for gpt2"),
        ("flex_attention", OPTConfig(attention_dropout=0.2), "cuda", False, "no dropout and attention_dropout is 0.2"),
    ],
)
def test_auto_takes_the_fastest_and_what_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: Any, config: Any, device: str, has_flash: bool, expected: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (object() if has_flash else None) if name == "flash_attn" else find_spec(name, *rest),
    )
    if expected in ("flash_attention_2", "flex_attention", "sdpa", "eager"):
        assert choose_attention(asked, config, device_type=device) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            choose_attention(asked, config, device_type=device)
