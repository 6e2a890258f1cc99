"""Liger's kernels compute what transformers' modules do, stay with the model they were given to, and are never saved.

Run as a script (`test_liger.py KIND`) this file prints the largest differences of outputs and gradients: Triton's
interpreter has to be chosen before Triton is imported, so it needs a process of its own. No GPU has run this.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, Qwen2Config

from samtrain.core.errors import ConfigError
from samtrain.model.liger import apply_liger, choose_liger, runs_liger
from samtrain.model.lora import attach_lora
from samtrain.model.options import LoraOptions, ModelOptions

CONFIGS: dict[str, PretrainedConfig] = {
    kind: config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=60,
    )
    for kind, config in {"llama": LlamaConfig, "qwen2": Qwen2Config}.items()
}  # fmt: skip


def measure(kind: str) -> dict[str, Any]:
    """A language model with LoRA and recomputation, before and after."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(value: Any) -> Any:  # the interpreter leaves them Python's, and Liger's kernels cast them
        if isinstance(value, float):
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(value)

    interpreter._implicit_cvt = convert_floats_too
    from liger_kernel.ops import rms_norm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)  # libdevice's is empty there

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).train()
    holder = torch.nn.Module()
    holder.language_model = model
    attach_lora(holder, LoraOptions(r=2))
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_(".lora_" in name or "norm" in name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    embeds = torch.randn(1, 7, 32, requires_grad=True)

    def run(one: Any) -> list[torch.Tensor]:
        one.zero_grad()
        embeds.grad = None
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        logits = one(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
        (logits * torch.arange(logits.numel()).view_as(logits).sin()).sum().backward()
        trained = {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}
        return [logits.detach(), embeds.grad.clone(), *(trained[name] for name in sorted(trained))]

    home = sys.modules[type(model).__module__]
    classes = {name: value for name, value in vars(home).items() if isinstance(value, type)}
    own_rotary = home.apply_rotary_pos_emb
    expected, names = run(model), list(model.state_dict())
    apply_liger(model)
    found = run(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = (Path(folder, "config.json").read_text() + str(sorted(os.listdir(folder)))).lower()
    states = [torch.randn(1, heads, 7, 16) for heads in (2, 1)]
    angles = torch.randn(1, 7, 8).repeat(1, 1, 2)
    rotated = own_rotary(*(s.clone() for s in states), angles.cos(), angles.sin())
    by_liger = liger_rotary_pos_emb(*(s.clone() for s in states), angles.cos(), angles.sin())
    apply_liger(AutoModelForCausalLM.from_config(CONFIGS[kind]))  # another model of the process
    return {
        "scale": float(max(x.abs().max() for x in expected)),
        "difference": max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)),
        "rotary": max(float((a - b).abs().max()) for a, b in zip(rotated, by_liger)),
        "modules": sorted(type(m).__name__[-3:] for m in model.modules() if runs_liger(m)),
        "same_names": list(model.state_dict()) == names,
        "same_classes": all(getattr(home, name) is value for name, value in classes.items()),
        "rotary_changed": home.apply_rotary_pos_emb is not own_rotary,
        "one_wrapper": home.apply_rotary_pos_emb.transformers_own is own_rotary,
        "saved": "liger" in saved,
    }


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_kernels_compute_what_transformers_does_and_leave_no_trace(kind: str) -> None:
    pytest.importorskip("liger_kernel")
    command, environment = [sys.executable, __file__, kind], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < 2e-6 * max(1.0, found["scale"])  # float32
    assert found["rotary"] < 1e-6
    assert found["modules"] == ["MLP"] * 2 + ["orm"] * 5
    assert found["same_names"] and found["same_classes"] and not found["saved"]
    assert found["rotary_changed"] and found["one_wrapper"]


LLAMA = CONFIGS["llama"]


@pytest.mark.parametrize(
    ("asked", "config", "device_type", "expected"),
    [
        ("auto", LLAMA, "cuda", "liger-kernel .* for llama"),
        (True, LLAMA, "cuda", "liger-kernel .* for llama"),
        ("auto", LLAMA, "cpu", "off: its kernels need a GPU and this runs on cpu"),
        ("auto", OPTConfig(), "cuda", "off: Liger has no kernels for opt"),
        (False, LLAMA, "cuda", "off: model.liger: false"),
    ],
)
def test_auto_runs_them_where_they_can_and_says_so(asked: Any, config: Any, device_type: str, expected: str) -> None:
    if "liger-kernel" in expected or "no kernels" in expected:
        pytest.importorskip("liger_kernel")
    is_on, words = choose_liger(asked, config, device_type=device_type)
    assert is_on is (not words.startswith("off")) and re.fullmatch(expected, words)


@pytest.mark.parametrize("problem", ["device", "architecture", "absent", "broken"])
def test_asked_for_where_they_cannot_run_they_are_refused(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    config, device_type = LLAMA, "cuda"
    if problem == "device":
        device_type, message = "cpu", "need a GPU"
    elif problem == "architecture":
        pytest.importorskip("liger_kernel")
        config, message = OPTConfig(), "no kernels for opt"
    elif problem == "absent":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        message = r"not installed \(pip install 'samtrain\[gpu\]'\)"
    else:
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        message = "cannot be imported"
    with pytest.raises(ConfigError, match=f"model.liger is true, but .*{message}"):
        choose_liger(True, config, device_type=device_type)
    assert choose_liger("auto", config, device_type=device_type)[0] is False


def test_a_liger_that_does_not_fit_is_an_error_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    liger = pytest.importorskip("liger_kernel.transformers")

    def broken(**ignored: Any) -> None:
        raise AttributeError("no attribute 'layers'")

    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", broken)
    with pytest.raises(ConfigError, match=r"liger-kernel \S+, transformers \S+ do not fit: no attribute 'layers'"):
        apply_liger(AutoModelForCausalLM.from_config(LLAMA))


def test_yaml_spellings() -> None:
    assert ModelOptions().liger == "auto"
    assert [ModelOptions(liger=value).liger for value in (True, False, "auto")] == [True, False, "auto"]
    with pytest.raises(ValueError, match="liger"):
        ModelOptions(liger="always")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
