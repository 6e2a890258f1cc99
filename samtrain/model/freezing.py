"""What trains: the parts of the model by parameter name, requires_grad, LoRA, and eval mode for what is frozen."""

from typing import Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from samtrain.core.parameters import num_elements
from samtrain.model.options import TrainablePartsOptions

Part = Literal["guidance", "vision", "qformer", "projection", "language_model"]
PARTS: tuple[Part, ...] = ("guidance", "vision", "qformer", "projection", "language_model")

_PREFIXES: dict[str, Part] = {
    "guidance": "guidance",
    "vision_model": "vision",
    "qformer": "qformer",
    "query_tokens": "qformer",
    "language_projection": "projection",
    "language_model": "language_model",
}


def part_of(parameter_name: str) -> Part:
    """The part a parameter belongs to, by its name (wrappers' `module.` in front is ignored)."""
    while parameter_name.startswith("module."):
        parameter_name = parameter_name.removeprefix("module.")
    first = parameter_name.split(".", 1)[0]
    if first not in _PREFIXES:
        raise KeyError(f"parameter {parameter_name!r} belongs to no part; known prefixes: {', '.join(_PREFIXES)}")
    return _PREFIXES[first]


def apply_freezing(model: nn.Module, options: TrainablePartsOptions) -> None:
    """Set requires_grad of every parameter, and eval mode of what is frozen. LoRA adapters must be attached already."""
    trains = {
        "guidance": options.guidance,
        "vision": options.vision,
        "qformer": options.qformer,
        "projection": options.projection,
        "language_model": options.language_model == "full",
    }
    for name, parameter in model.named_parameters():
        is_adapter = options.language_model == "lora" and ".lora_" in name
        # A mask token (DINOv2, for its own pretraining) is never read here, so it would never get a gradient.
        parameter.requires_grad_((trains[part_of(name)] or is_adapter) and not name.endswith(".mask_token"))
    model.train(model.training)


def trainable_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (trainable, all) parameters; right under ZeRO-3 too. Tied parameters count once."""
    by_part: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        by_part[part_of(name)].append(parameter)
    return {
        part: (num_elements(p for p in parameters if p.requires_grad), num_elements(parameters))
        for part, parameters in by_part.items()
    }


def keep_frozen_parts_in_eval(model: nn.Module) -> None:
    """Put parts without a trainable parameter in eval mode, so that their dropout and batch norm stand still.

    transformers' checkpointed layers recompute only while their own `training` flag is set. A frozen language model
    above something that trains needs recomputation too, so that flag alone stays on; the layer's children, where
    dropout lives, stay in eval, and a dropout rate the layer itself holds (OPT) is set to zero.
    """
    for name, child in model.named_children():
        if any(p.requires_grad for p in child.parameters()):
            continue
        child.eval()
        if name != "language_model" or not model.training:
            continue
        for layer in child.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = True
                if isinstance(getattr(layer, "dropout", None), float):
                    layer.dropout = 0.0  # type: ignore[assignment]
