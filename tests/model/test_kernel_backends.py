"""The backends of `model.kernels` train alike; where one cannot run, another does or the user hears why.

Run as a script (`test_kernel_backends.py CASE KERNELS STEPS`) this file prints the losses of a training run: Triton's
interpreter has to be chosen before Triton is imported, so it needs a process of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from samtrain_kernels import Backend
from transformers import InstructBlipQFormerConfig, InstructBlipVisionConfig, LlamaConfig

from samtrain.core.batch import ImageGroups
from samtrain.core.errors import ConfigError
from samtrain.model import SamMllmConfig, SamMllmForConditionalGeneration
from samtrain.model.freezing import apply_freezing
from samtrain.model.kernels import choose_kernels
from samtrain.model.options import ModelOptions, TrainablePartsOptions

IMAGE_TOKEN, QUERIES, STEPS = 31, 8, 20
# Ragged: one image alone (no context with `others`), a sample without images, two others to mix. Small, for the
# interpreter: one head, two or three samples.
COUNTS = [[2, 1], [0, 3], [1, 2]]
CASES: dict[str, dict[str, Any]] = {
    # The W stream runs once a sample before l, once an image from l to k.
    "all, frozen Q-Former": {"guidance_context": "all", "initial_layer": 2, "contextual_layer": 3},
    "others, order, trained": {"guidance_context": "others", "initial_layer": 1, "contextual_layer": 3},
    "own, order, trained": {"guidance_context": "own", "initial_layer": 2, "contextual_layer": 3},
}
# fp32: products are summed in another order: 2e-7 here after 20 steps, Adam included.
TOLERANCE = 2e-6


def build(case: str, kernels: Backend) -> SamMllmForConditionalGeneration:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 1}
    config = SamMllmConfig(
        vision_config=InstructBlipVisionConfig(
            **shape, num_hidden_layers=1, image_size=16, patch_size=4, initializer_range=0.3
        ),
        qformer_config=InstructBlipQFormerConfig(
            **shape, num_hidden_layers=4, vocab_size=40, encoder_hidden_size=16, initializer_range=0.2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        text_config=LlamaConfig(**shape, num_hidden_layers=1, vocab_size=32, pad_token_id=0),
        num_query_tokens=QUERIES, image_token_id=IMAGE_TOKEN, order_embedding="order" in case, max_images=4,
        initializer_range=0.3, **CASES[case],
    )  # fmt: skip
    model = SamMllmForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.guidance.parameters():  # zeros would hide the context for the first steps
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.kernels = kernels
    apply_freezing(model, TrainablePartsOptions(qformer="trained" in case, projection=True))
    return model.train()


def batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    counts = COUNTS[step % len(COUNTS)]
    answers = torch.randint(1, IMAGE_TOKEN, (len(counts), 4), generator=generator)
    ids = [torch.cat([torch.full((QUERIES * n,), IMAGE_TOKEN), answer]) for n, answer in zip(counts, answers)]
    labels = [torch.cat([torch.full((QUERIES * n + 1,), -100), answer[1:]]) for n, answer in zip(counts, answers)]
    lengths = torch.tensor([0, *map(len, ids)])
    return {
        "input_ids": torch.cat(ids),
        "labels": torch.cat(labels),
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
        "pixel_values": torch.randn(sum(counts), 3, 16, 16, generator=generator),
        "image_groups": ImageGroups.from_counts(counts),
        "qformer_input_ids": torch.randint(1, 40, (len(counts), 3), generator=generator),
    }


def train(case: str, kernels: Backend, steps: int = STEPS) -> list[float]:
    """Losses of the first `steps` updates."""
    model = build(case, kernels)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def materialised() -> dict[str, list[float]]:
    return {case: train(case, "materialised") for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_model_trains_alike_with_scores_mixed_and_context_materialised(
    materialised: dict[str, list[float]], case: str
) -> None:
    assert train(case, "reference") == pytest.approx(materialised[case], rel=TOLERANCE)


def test_the_losses_depend_on_the_context(
    materialised: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the comparison above compared nothing."""
    for case, losses in materialised.items():
        other = {"others": "all", "all": "others", "own": "others"}[CASES[case]["guidance_context"]]
        monkeypatch.setitem(CASES[case], "guidance_context", other)
        difference = [abs(a - b) for a, b in zip(train(case, "materialised"), losses)]
        assert max(difference) > 100 * TOLERANCE * max(losses), case


@pytest.mark.parametrize(
    ("case", "steps"),
    [("others, order, trained", STEPS), ("all, frozen Q-Former", 3), ("own, order, trained", 3)],
)
def test_a_model_trains_alike_with_the_triton_kernels(
    materialised: dict[str, list[float]], case: str, steps: int
) -> None:
    """In the interpreter, fp32."""
    pytest.importorskip("triton")
    process = subprocess.run(
        [sys.executable, __file__, case, "triton", str(steps)], capture_output=True, text=True, timeout=500,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == pytest.approx(materialised[case][:steps], rel=TOLERANCE)


def test_attention_dropout_that_acts_takes_the_materialised_path_whatever_was_asked_for() -> None:
    losses = []
    for kernels in ("materialised", "reference"):
        model = build("others, order, trained", kernels)
        for layer in model.qformer.encoder.layer[::2]:
            layer.crossattention.attention.attention_dropout = 0.5
        model.config.qformer_config.attention_probs_dropout_prob = 0.5
        torch.manual_seed(1)
        losses.append(float(model(**batch(0)).loss.detach()))
    assert losses[0] == losses[1]
    model.eval()  # dropout rests, and what was asked for runs
    calls: list[int] = []
    model.qformer.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(**batch(0))
    assert calls == []


def test_the_choice_follows_the_device_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("SAMTRAIN_KERNELS", raising=False)
    plain, dropping = (InstructBlipQFormerConfig(attention_probs_dropout_prob=p) for p in (0.0, 0.1))
    assert choose_kernels("reference", plain, device_type="cpu", qformer_trains=True) == "reference"
    assert choose_kernels("reference", dropping, device_type="cpu", qformer_trains=False) == "reference"
    assert choose_kernels("reference", dropping, device_type="cpu", qformer_trains=True) == "materialised"
    with pytest.raises(ConfigError, match=r"model\.kernels: .*triton.* cpu"):
        choose_kernels("triton", plain, device_type="cpu", qformer_trains=True)
    monkeypatch.setenv("SAMTRAIN_KERNELS", "reference")
    assert choose_kernels("auto", plain, device_type="cpu", qformer_trains=True) == "reference"
    assert choose_kernels("materialised", plain, device_type="cpu", qformer_trains=True) == "materialised"
    monkeypatch.setenv("SAMTRAIN_KERNELS", "fast")
    with pytest.raises(ConfigError, match="SAMTRAIN_KERNELS='fast' is unknown"):
        choose_kernels("auto", plain, device_type="cpu", qformer_trains=True)


def test_heads_that_the_kernels_cannot_take_fall_back_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("SAMTRAIN_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    narrow = InstructBlipQFormerConfig(hidden_size=48, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    with pytest.raises(ConfigError, match="heads are 24 wide"):
        choose_kernels("triton", narrow, device_type="cpu", qformer_trains=True)
    assert choose_kernels("auto", narrow, device_type="cuda", qformer_trains=True) == "materialised"
    wide = InstructBlipQFormerConfig(attention_probs_dropout_prob=0.0)  # 64
    assert choose_kernels("auto", wide, device_type="cuda", qformer_trains=True) == "triton"


def test_recipes_know_the_backends_of_the_kernels() -> None:
    assert ModelOptions.model_fields["kernels"].annotation == Backend


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], sys.argv[2], int(sys.argv[3]))))  # type: ignore[arg-type]
