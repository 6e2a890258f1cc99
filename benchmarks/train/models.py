"""Random weights once, and every model of the benchmark as another view of them.

A peer's parameters are its own objects (what trains differs) over the same memory: three 7B models take the room of
one, and are equal without being copied.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration, PreTrainedModel
from transformers.initialization import no_init_weights

from benchmarks.train.shapes import ModelShape, Train, trains
from samtrain.core.seeds import derive_seed
from samtrain.model.device_choices import DeviceChoices, choose_for_device
from samtrain.model.freezing import apply_freezing
from samtrain.model.modeling import SamMllmForConditionalGeneration
from samtrain.model.options import ModelOptions

Model = TypeVar("Model", bound=PreTrainedModel)
EMBEDDINGS = ("embed_tokens", "word_embeddings", "position_embedding", "class_embedding", "query_tokens")


def build_ours(
    shape: ModelShape,
    *,
    train: Train,
    guided: bool = True,
    dtype: torch.dtype,
    device: torch.device,
    runs_on: str,
    like: nn.Module | None = None,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> SamMllmForConditionalGeneration:
    """Our model in train mode, its frozen parts in eval.

    Args:
        device: where it is made. runs_on: type of the device that will run it ("cuda", "cpu"), which decides what a
            recipe leaves to `auto`. asked: keys of a recipe's `model` that leave it less ({"liger": False}).
        like: a model whose memory the weights of the same names share; None: random ones are drawn (none on meta).
    """
    place = torch.device("meta") if like is not None else device
    choices = choices_for(shape, train=train, guided=guided, runs_on=runs_on, asked=asked)
    model = construct_ours(shape, guided=guided, dtype=dtype, device=place, attention=choices.attention)
    options = trains(train, guided=guided)
    if options.language_model == "lora":
        _attach_lora(model, train, device, is_empty=like is not None)
    fill(model, like=like)
    apply_freezing(model, options)
    choices.apply(model)
    return model.train()


def choices_for(
    shape: ModelShape, *, train: Train, guided: bool, runs_on: str, asked: Mapping[str, Any] = MappingProxyType({})
) -> DeviceChoices:
    """As a run's recipe would have them."""
    options = ModelOptions(train=trains(train, guided=guided), **asked)
    return choose_for_device(options, shape.config(guided=guided), device_type=runs_on)


def construct_ours(
    shape: ModelShape, *, guided: bool, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> SamMllmForConditionalGeneration:
    """Our model with whatever its memory holds; on the meta device it has none."""
    config = shape.config(guided=guided, attention=attention)
    for part in (config, config.vision_config, config.qformer_config, config.text_config):
        part.dtype = dtype
    return construct(lambda: SamMllmForConditionalGeneration(config), dtype, device)


def build_instructblip(
    shape: ModelShape, *, train: Train, dtype: torch.dtype, device: torch.device, attention: str, like: nn.Module
) -> InstructBlipForConditionalGeneration:
    """transformers' model as a careful user trains it: train mode, frozen parts in eval, nothing of ours inside."""
    config = shape.instructblip_config(attention=attention)
    model = construct(lambda: InstructBlipForConditionalGeneration(config), dtype, torch.device("meta"))
    options = trains(train, guided=False)
    if options.language_model == "lora":
        _attach_lora(model, train, device, is_empty=True)
    fill(model, like=like)
    apply_freezing(model, options)
    model.train()
    for child in model.children():
        if not any(parameter.requires_grad for parameter in child.parameters()):
            child.eval()
    return model


def construct(make: Callable[[], Model], dtype: torch.dtype, device: torch.device) -> Model:
    """A module in `dtype` on `device`, its parameters not yet drawn."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            return make()
    finally:
        torch.set_default_dtype(before)


def _attach_lora(model: nn.Module, train: Train, device: torch.device, *, is_empty: bool) -> None:
    from samtrain.model.lora import attach_lora

    with torch.device("meta" if is_empty else device):
        attach_lora(model, trains(train, guided=True).lora)  # type: ignore[arg-type]


@torch.no_grad()
def fill(model: nn.Module, *, like: nn.Module | None = None) -> None:
    """Draw the parameters, or share those of `like` by name; buffers are always made anew or copied."""
    theirs = dict(like.named_parameters()) if like is not None else {}
    buffers = dict(like.named_buffers()) if like is not None else {}
    for name, module in model.named_modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            full = f"{name}.{own}" if name else own
            if full in theirs:
                module._parameters[own] = nn.Parameter(theirs[full].data)
            elif parameter.device.type != "meta":
                _draw(parameter, full)
        for own in module._buffers:
            full = f"{name}.{own}" if name else own
            if full in buffers:
                module._buffers[own] = buffers[full]
    devices = {tensor.device for _, tensor in _tensors(model)}
    assert len(devices) == 1, f"tensors on {devices}: {type(model).__name__} has some that the shared model lacks"


def _draw(parameter: nn.Parameter, name: str) -> None:
    """Unit variance through a layer at any width, biases small, norms near one; depends on the name alone.

    A and B of guidance, zero before training, are drawn too: all gradients must be there.
    """
    generator = torch.Generator(parameter.device).manual_seed(derive_seed("weights", name))
    last = name.rsplit(".", 1)[-1]
    if parameter.dim() > 1 and not any(part in name for part in EMBEDDINGS):
        parameter.normal_(0.0, 1.0 / math.sqrt(parameter[0].numel()), generator=generator)
    elif parameter.dim() > 1:
        parameter.normal_(0.0, 1.0 if "embed_tokens" in name else 0.5, generator=generator)
    elif last == "weight":
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, 0.02, generator=generator)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
