"""LoRA on the language model, through PEFT, and merging it away for export."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from samtrain.model.modeling import SamMllmForConditionalGeneration
from samtrain.model.options import LoraOptions

_ADAPTER = "default"


def attach_lora(model: SamMllmForConditionalGeneration, options: LoraOptions) -> None:
    """Add adapters inside `model.language_model`, in place; parameter names keep their `language_model.` in front.

    Only shapes of the base layers are read, never their values, so partitioned ones work too.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    dtype = model.language_model.dtype
    inject_adapter_in_model(config, model.language_model, adapter_name=_ADAPTER)
    for name, parameter in model.language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def merged_for_export(model: nn.Module, tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of a model with LoRA -> those of the same model without: W + scaling * B A, under W's plain name.

    Without LoRA, what comes in goes out. Works on a stream, holding back one layer's tensors at a time.

    Args:
        model: the live model; only scalings are read from it. tensors: (name, whole tensor); None (ranks that do not
            hold it) is passed over.
    """
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if tensor is None:
            continue
        before, found, after = name.partition(".base_layer.")
        if found and after != "weight":
            yield f"{before}.{after}", tensor
            continue
        kind = "base"
        if not found:
            before, found, after = name.partition(".lora_")
            kind = after.partition(".")[0]
        if not found:
            yield name, tensor
            continue
        layer = held.setdefault(before, {})
        layer[kind] = tensor
        if len(layer) == 3:
            yield f"{before}.weight", _merge(model.get_submodule(before), **held.pop(before))
    assert not held, f"LoRA tensors without their base layer: {sorted(held)}"


def _merge(module: nn.Module, *, base: Tensor, A: Tensor, B: Tensor) -> Tensor:
    scaling: float = module.scaling[_ADAPTER]  # type: ignore[index, assignment]
    delta = scaling * (B.float() @ A.float())
    if getattr(module, "fan_in_fan_out", False):  # GPT-2's Conv1D stores its weight transposed
        delta = delta.T
    return (base.to(torch.promote_types(base.dtype, torch.float32)) + delta.to(base.device)).to(base.dtype)
