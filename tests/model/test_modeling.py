"""The whole model: against transformers' InstructBLIP, packed against separate samples, gradients everywhere."""

from itertools import combinations
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from samtrain.core.batch import IGNORE_INDEX, ImageGroups, PackedBatch
from samtrain.core.errors import BatchError, ConfigError
from samtrain.model import SamMllmForConditionalGeneration
from samtrain.model.freezing import apply_freezing
from samtrain.model.guidance import extract_visual_tokens
from samtrain.model.options import TrainablePartsOptions
from samtrain.model.vision import patch_features

BACKENDS = ["materialised", "reference"]
EVERYTHING = TrainablePartsOptions(vision=True, qformer=True, projection=True, language_model="full")


def sample(batch: PackedBatch, s: int) -> dict[str, Any]:
    """Model inputs of one sample of a pack, as a pack of its own."""
    (a, b), (c, d) = batch.cu_seqlens[s : s + 2].tolist(), batch.cu_images[s : s + 2].tolist()
    keep = batch.qformer_attention_mask[s].bool()
    return {
        "input_ids": batch.input_ids[a:b],
        "labels": batch.labels[a:b],
        "cu_seqlens": torch.tensor([0, b - a], dtype=torch.int32),
        "pixel_values": batch.pixel_values[c:d],
        "image_groups": ImageGroups.from_counts([d - c]),
        "qformer_input_ids": batch.qformer_input_ids[s : s + 1][:, keep],
        "qformer_attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.int64),
    }


def padded(batch: PackedBatch, *, labels: bool = True) -> dict[str, Any]:
    """The samples of a pack as left-padded rows."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    rows = {"input_ids": 0, "labels": IGNORE_INDEX}
    out: dict[str, Any] = {}
    for name, fill in rows.items():
        out[name] = torch.full((len(lengths), max(lengths)), fill)
    out["attention_mask"] = torch.zeros_like(out["input_ids"])
    for s, length in enumerate(lengths):
        a = int(batch.cu_seqlens[s])
        for name in rows:
            out[name][s, -length:] = getattr(batch, name)[a : a + length]
        out["attention_mask"][s, -length:] = 1
    for name in ("pixel_values", "image_groups", "qformer_input_ids", "qformer_attention_mask"):
        out[name] = getattr(batch, name)
    if not labels:
        del out["labels"]
    return out


def instructblip(model: SamMllmForConditionalGeneration) -> InstructBlipForConditionalGeneration:
    """transformers' InstructBLIP with the same weights, by name."""
    c = model.config
    config = InstructBlipConfig(
        vision_config=c.vision_config, qformer_config=c.qformer_config, text_config=c.text_config,
        num_query_tokens=c.num_query_tokens, image_token_index=c.image_token_id,
    )  # fmt: skip
    other = InstructBlipForConditionalGeneration(config).eval()
    state = {n: p for n, p in model.state_dict().items() if not n.startswith("guidance.")}
    other.load_state_dict(state, strict=True)
    return other


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("context", ["others", "all", "own"])
def test_before_training_outputs_equal_transformers_instructblip(
    tiny_model: Any, make_batch: Any, context: str, kernels: str
) -> None:
    model = tiny_model(guidance_context=context, order_embedding=True, kernels=kernels)
    other = instructblip(model)
    batch = make_batch([2, 1, 3])
    with torch.no_grad():
        got = model(**batch.model_inputs(), return_logits=True)
        for s in range(3):
            one = sample(batch, s)
            images = one["pixel_values"]
            features = other.get_image_features(
                images, qformer_input_ids=one["qformer_input_ids"].expand(len(images), -1), return_dict=True
            )
            a, b = batch.cu_images[s : s + 2].tolist()
            queries = features.qformer_outputs.last_hidden_state[:, : model.config.num_query_tokens]
            assert (got.query_outputs[a:b] - queries).abs().max() < 1e-5
            visual = other.language_projection(queries).flatten(0, 1)
            text = one["input_ids"][len(visual) :]
            embeds = torch.cat([visual, other.get_input_embeddings()(text)])[None]
            logits = other.language_model(inputs_embeds=embeds).logits
            a, b = batch.cu_seqlens[s : s + 2].tolist()
            assert (got.logits[:, a:b] - logits).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt2"])
def test_packed_separate_and_padded_samples_agree(tiny_model: Any, make_batch: Any, kind: str, attention: str) -> None:
    model = tiny_model(kind, random_guidance=True)
    model.set_attn_implementation(attention)
    batch = make_batch([2, 0, 1, 3])
    with torch.no_grad():
        packed = model(**batch.model_inputs())
        full = model(**batch.model_inputs(), return_logits=True)
        alone = [model(**sample(batch, s), return_logits=True) for s in range(4)]
        rows = model(**padded(batch))
    assert int(packed.num_label_tokens) == 12 and packed.loss_sum.dtype == torch.float32
    for other in (full.loss_sum, sum(o.loss_sum for o in alone), rows.loss_sum, packed.loss * 12):
        assert abs(float(packed.loss_sum - other)) < 1e-4  # sums of 12 float32 losses of about 4
    assert (full.logits - torch.cat([o.logits for o in alone], 1)).abs().max() < 1e-5


def test_loss_equals_cross_entropy_over_all_logits(tiny_model: Any, make_batch: Any) -> None:
    model = tiny_model(random_guidance=True)
    batch = make_batch([2, 1])
    with torch.no_grad():
        out = model(**batch.model_inputs(), return_logits=True)
    expected = torch.nn.functional.cross_entropy(
        out.logits[0, :-1], batch.labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert abs(float(out.loss_sum - expected)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt2"])
def test_generation_is_the_same_for_any_batch_size(tiny_model: Any, make_batch: Any, kind: str) -> None:
    model = tiny_model(kind, random_guidance=True)
    model.config.eos_token_id, model.config.pad_token_id = 2, 0
    batch = make_batch([2, 1, 3, 0])
    together = padded(batch, labels=False)
    options = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False, "repetition_penalty": 1.5}
    expected = model.generate(**together, **options)
    assert expected.shape[0] == 4 and expected.shape[1] <= 7
    for s in range(4):
        one = sample(batch, s)
        alone = model.generate(
            one["input_ids"][None], pixel_values=one["pixel_values"], image_groups=one["image_groups"],
            qformer_input_ids=one["qformer_input_ids"], qformer_attention_mask=one["qformer_attention_mask"], **options,
        )  # fmt: skip
        width = alone.shape[1]
        assert torch.equal(expected[s, :width], alone[0]) and set(expected[s, width:].tolist()) <= {0, 2}


def test_generation_continues_with_the_token_the_logits_prefer(tiny_model: Any, make_batch: Any) -> None:
    model = tiny_model(random_guidance=True)
    one = sample(make_batch([2]), 0)
    del one["labels"], one["cu_seqlens"]
    one["input_ids"] = one["input_ids"][None]
    with torch.no_grad():
        logits = model(**one).logits
    assert int(model.generate(**one, max_new_tokens=1, do_sample=False)[0, 0]) == int(logits[0, -1].argmax())


BATCHES = {"images": [2, 3], "text only": [0, 0], "one image each": [1, 1], "mixed": [0, 2]}


@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("mode", ["materialised", "reference", "own", "none"])
@pytest.mark.parametrize("options", [EVERYTHING, TrainablePartsOptions(qformer=True)], ids=["everything", "qformer"])
def test_every_trainable_parameter_gets_a_gradient_from_every_batch(
    tiny_model: Any, make_batch: Any, options: TrainablePartsOptions, mode: str, with_labels: bool, counts: list[int]
) -> None:
    kernels = "reference" if mode == "own" else mode
    guidance = {"guidance_mode": "none"} if mode == "none" else {"order_embedding": True, "kernels": kernels}
    if mode == "own":
        guidance["guidance_context"] = "own"
    model = tiny_model(**guidance, dropout=0.1 if mode == "materialised" else 0.0).train()
    apply_freezing(model, options)
    inputs = make_batch(counts).model_inputs()
    if not with_labels:
        inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
    out = model(**inputs)
    out.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    if not with_labels:
        assert float(out.loss_sum) == 0.0 and int(out.num_label_tokens) == 0


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("context", ["others", "own"])
def test_every_batch_makes_the_same_module_calls(tiny_model: Any, make_batch: Any, context: str, kernels: str) -> None:
    model = tiny_model(guidance_context=context, order_embedding=True, kernels=kernels).train()
    apply_freezing(model, TrainablePartsOptions())
    names = {module: name for name, module in model.named_modules()}
    calls: list[str] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, _: calls.append(names[m]))
    seen = []
    for counts in BATCHES.values():
        for with_text in (True, False):
            inputs = make_batch(counts).model_inputs()
            if not with_text:
                inputs |= {"qformer_input_ids": torch.zeros(2, 0, dtype=torch.int64), "qformer_attention_mask": None}
                inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
            calls.clear()
            model(**inputs)
            seen.append(tuple(calls))
    assert len(seen[0]) > 50 and len(set(seen)) == 1


def test_a_batch_without_images_gives_the_loss_of_its_text_alone(tiny_model: Any, make_batch: Any) -> None:
    model = tiny_model(random_guidance=True)
    batch = make_batch([0])
    with torch.no_grad():
        loss = model(**batch.model_inputs()).loss
        text = model.language_model(input_ids=batch.input_ids[None], labels=batch.labels[None]).loss
    assert abs(float(loss - text)) < 1e-6


@pytest.mark.parametrize("kernels", BACKENDS)
def test_at_step_0_only_b_gets_a_gradient_that_is_not_zero(tiny_model: Any, make_batch: Any, kernels: str) -> None:
    model = tiny_model(order_embedding=True, kernels=kernels).train()
    apply_freezing(model, TrainablePartsOptions())
    batch = make_batch([2, 3])

    def moved() -> set[str]:
        model.zero_grad()
        model(**batch.model_inputs()).loss_sum.backward()
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    b = {"guidance.context_projection.weight", "guidance.context_projection.bias"}
    assert moved() == b
    with torch.no_grad():
        model.guidance.context_projection.weight.add_(0.01 * torch.randn(16, 16))
    # The bias of the adjustment never moves: softmax over images does not see a constant.
    assert moved() == b | {
        "guidance.initial_projection.weight",
        "guidance.initial_projection.bias",
        "guidance.patch_score.weight",
        "guidance.order_embedding.weight",
    }


def test_padded_rows_with_a_wrong_number_of_image_tokens_are_refused(tiny_model: Any, make_batch: Any) -> None:
    model = tiny_model()
    inputs = padded(make_batch([2, 1]))
    inputs["image_groups"] = ImageGroups.from_counts([1, 2])
    with pytest.raises(BatchError, match="row 0: 6 image tokens but 1 images x 3 query tokens = 3"):
        model(**inputs)


def test_images_without_groups_are_refused(tiny_model: Any, make_batch: Any) -> None:
    inputs = make_batch([2]).model_inputs()
    inputs["image_groups"] = None
    with pytest.raises(BatchError, match="2 images without image_groups"):
        tiny_model()(**inputs)


def test_a_language_model_without_position_ids_is_refused(tiny_config: Any) -> None:
    from transformers import BloomConfig

    config = tiny_config()
    config.text_config = BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match="BloomForCausalLM takes no `position_ids`"):
        SamMllmForConditionalGeneration(config)


def test_layers_out_of_order_or_range_are_refused(tiny_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"l = 3.*k = 2"):
        tiny_config(initial_layer=3, contextual_layer=2)
    with pytest.raises(ConfigError, match=r"k = 5.*<= 4, the layers of the Q-Former"):
        tiny_config(initial_layer=3, contextual_layer=5)


@pytest.mark.parametrize(("kind", "context"), [("llama", "all"), ("opt", "own")])
def test_a_saved_model_loads_through_the_auto_classes_with_equal_logits(
    tiny_model: Any, make_batch: Any, tmp_path: Any, kind: str, context: str
) -> None:
    model = tiny_model(kind, random_guidance=True, order_embedding=True, guidance_context=context)
    batch = make_batch([2, 1])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.guidance_context, config.contextual_layer) == ("sam_mllm", context, 3)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        difference = model(**batch.model_inputs(), return_logits=True).logits
        difference = difference - loaded(**batch.model_inputs(), return_logits=True).logits
    assert type(loaded) is SamMllmForConditionalGeneration and float(difference.abs().max()) == 0.0


@pytest.mark.parametrize("kernels", BACKENDS)
def test_bfloat16_runs_and_stays_near_float32(tiny_model: Any, make_batch: Any, kernels: str) -> None:
    batch = make_batch([2, 3])
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(random_guidance=True, order_embedding=True, dtype=dtype, kernels=kernels).train()
        apply_freezing(model, TrainablePartsOptions())
        out = model(**batch.model_inputs())
        out.loss_sum.backward()
        losses.append(float(out.loss_sum))
        assert out.loss_sum.dtype == torch.float32
    assert abs(losses[0] - losses[1]) / losses[0] < 0.05  # bf16 has 8 bits of precision


def test_any_vision_tower_of_transformers_feeds_the_model(tiny_config: Any, make_batch: Any) -> None:
    from transformers import CLIPVisionConfig, ConvNextConfig, Dinov2Config

    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    towers = [CLIPVisionConfig(**shape, intermediate_size=16), Dinov2Config(**shape)]
    towers.append(ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2))
    for tower in towers:
        config = tiny_config()
        config.vision_config = tower
        model = SamMllmForConditionalGeneration(config).train()
        apply_freezing(model, EVERYTHING)
        model(**make_batch([2, 1]).model_inputs()).loss_sum.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, tower.model_type


@pytest.mark.parametrize("kernels", BACKENDS)
def test_the_context_of_a_batch_can_be_replaced_or_left_out(tiny_model: Any, make_batch: Any, kernels: str) -> None:
    model = tiny_model(random_guidance=True, order_embedding=True, kernels=kernels)
    batch, others = make_batch([2, 0, 1]), make_batch([2, 0, 1], seed=1).pixel_values
    inputs = batch.model_inputs()
    with torch.no_grad():
        true, same = model(**inputs), model(**inputs, context_pixel_values=batch.pixel_values)
        replaced, left_out = model(**inputs, context_pixel_values=others), model(**inputs, use_context=False)
        features = [patch_features(model.vision_model, pixels) for pixels in (batch.pixel_values, others)]
        expected = extract_visual_tokens(
            model.qformer, model.guidance, config=model.config, query_tokens=model.query_tokens, features=features[0],
            context_features=features[1], groups=batch.image_groups, input_ids=batch.qformer_input_ids,
            attention_mask=batch.qformer_attention_mask, backend=kernels,
        )  # fmt: skip
    assert torch.equal(same.loss_sum, true.loss_sum) and torch.equal(replaced.query_outputs, expected)
    for one, other in combinations((true, replaced, left_out), 2):
        assert (one.query_outputs[:2] - other.query_outputs[:2]).abs().max() > 1e-3
        assert not torch.equal(one.loss_sum, other.loss_sum)
    assert torch.equal(replaced.query_outputs[2], true.query_outputs[2])  # an image alone has no context


def test_a_batch_without_images_has_no_context_to_replace(tiny_model: Any, make_batch: Any) -> None:
    model = tiny_model(random_guidance=True)
    inputs = make_batch([0]).model_inputs()
    with torch.no_grad():
        true, replaced = model(**inputs), model(**inputs, context_pixel_values=inputs["pixel_values"])
    assert torch.equal(true.loss_sum, replaced.loss_sum)


def test_as_many_images_are_read_as_context_as_there_are(tiny_model: Any, make_batch: Any) -> None:
    with pytest.raises(BatchError, match="3 images but 2 to be read as context"):
        tiny_model()(**make_batch([2, 1]).model_inputs(), context_pixel_values=torch.zeros(2, 3, 8, 8))
