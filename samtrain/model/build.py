"""Builds a model from its options: construct, initialise, stream pretrained parts in, attach LoRA, freeze."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from samtrain.core.parameters import Gather, no_gather
from samtrain.core.seeds import derive_seed
from samtrain.model.device_choices import DeviceChoices, choose_for_device
from samtrain.model.freezing import apply_freezing
from samtrain.model.lora import attach_lora
from samtrain.model.modeling import SamMllmForConditionalGeneration
from samtrain.model.options import ModelOptions
from samtrain.model.parts import build_config, build_processor
from samtrain.model.pretrained import LoadReport, load_weights, plan_weights

__all__ = ["BuiltModel", "LoadReport", "build_model", "build_processor"]


class BuiltModel(NamedTuple):
    """report: where weights came from. choices: what runs on this device."""

    model: SamMllmForConditionalGeneration
    report: LoadReport
    choices: DeviceChoices


def build_model(
    options: ModelOptions,
    *,
    dtype: torch.dtype,
    seed: int,
    construction: Callable[[], AbstractContextManager[object]] = nullcontext,
    gather: Gather = no_gather,
    device_type: str = "cpu",
) -> BuiltModel:
    """The model of a recipe, with a report of where its weights came from.

    What no source gives is drawn from (seed, module name): equal for any number of ranks, partitioned or not, and
    whatever else is loaded. The random state of the process is left as it was.

    Args:
        construction: context in which modules are made (DeepSpeed's zero.Init under ZeRO-3).
        gather: makes partitioned parameters whole.
        device_type: where the model will run; it decides what is `auto` in `model.attn_implementation`, `kernels`,
            `liger` and `compile_vision`.

    Raises:
        ConfigError, CheckpointError: naming the part and its source.
    """
    config = build_config(options)
    choices = choose_for_device(options, config, device_type=device_type)
    config._attn_implementation = choices.attention
    size = getattr(config.vision_config, "image_size", None)
    processor = build_processor(options, image_size=size if isinstance(size, int) else 224)
    config.image_token_id = processor.image_token_id
    config.eos_token_id, config.pad_token_id = processor.eos_token_id, processor.pad_token_id
    for part in (config, config.vision_config, config.qformer_config, config.text_config):
        part.dtype = dtype
    with _isolated_randomness(derive_seed(seed, "construction")), _default_dtype(dtype):
        # Initialisation comes below, by name: transformers' own would run on partitioned (empty) parameters.
        with construction(), no_init_weights():
            model = SamMllmForConditionalGeneration(config)
        model.tie_weights()
        plan = plan_weights(model, options)
        initialise(model, seed=seed, loaded=set(plan.readers), gather=gather)
        load_weights(model, plan, gather=gather)
        if options.train.language_model == "lora":
            torch.manual_seed(derive_seed(seed, "lora"))
            attach_lora(model, options.train.lora)
    apply_freezing(model, options.train)
    choices.apply(model)
    return BuiltModel(model.eval(), plan.report, choices)


def build_empty(options: ModelOptions, *, dtype: torch.dtype = torch.float32) -> SamMllmForConditionalGeneration:
    """The model of a recipe from shapes alone, on the meta device: adapters attached, parts frozen, no weights.

    Nothing that depends on the device is chosen.

    Raises:
        ConfigError: as `build_config`.
    """
    config = build_config(options)
    if options.attn_implementation == "eager":
        config._attn_implementation = "eager"
    for part in (config, config.vision_config, config.qformer_config, config.text_config):
        part.dtype = dtype
    with torch.device("meta"), _default_dtype(dtype):
        with no_init_weights():
            model = SamMllmForConditionalGeneration(config)
        model.tie_weights()
        if options.train.language_model == "lora":
            attach_lora(model, options.train.lora)
    apply_freezing(model, options.train)
    return model


@torch.no_grad()
def initialise(model: PreTrainedModel, *, seed: int, loaded: set[str], gather: Gather) -> None:
    """Draw the parameters of every module that is not wholly in `loaded`, by the rules of the model it belongs to."""
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or all((f"{name}.{n}" if name else n) in loaded for n in own):
            continue
        owner = owners[max((o for o in owners if o == "" or f"{name}.".startswith(f"{o}.")), key=len)]
        with gather(list(own.values()), modifier_rank=0):
            torch.manual_seed(derive_seed(seed, name))
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            owner._init_weights(module)


@contextmanager
def _isolated_randomness(seed: int) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
