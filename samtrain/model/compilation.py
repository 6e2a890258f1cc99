"""The switch `model.compile_vision`: torch.compile of a frozen vision tower, layer by layer.

    true    on any device with a compiler; refused where the tower trains
    false   transformers' own modules
    auto    true on a GPU where the tower is frozen. No GPU has run it yet

All layers of a tower are one program, so two compilations serve any number of layers and images: for one image, and for
several. Under ZeRO-3 a compiled layer is gathered as a whole, before it is called: hooks inside would break its graph.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from samtrain.core.errors import ConfigError


def choose_compile_vision(asked: bool | Literal["auto"], *, vision_trains: bool, device_type: str) -> tuple[bool, str]:
    """Whether the tower's layers are compiled on `device_type` ("cuda", "cpu"), and why, in words.

    Raises:
        ConfigError: it is asked for, and the tower trains.
    """
    if asked is False:
        return False, "off: model.compile_vision: false"
    if vision_trains:
        if asked is True:
            raise ConfigError("model.compile_vision is true, but the tower trains; set it to auto or false")
        return False, "off: the tower trains"
    if asked == "auto" and device_type != "cuda":
        return False, f"off: auto compiles on a GPU and this runs on {device_type}"
    return True, "the tower's layers, frozen"


def compile_layers(tower: nn.Module, *, backend: str = "inductor") -> None:
    """Compile, at their first call, the tower's layers, or the whole tower where it has none that transformers marks.

    Parameters and their names stay, so nothing that is saved holds it.
    """
    layers: list[nn.Module] = [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in layers or [tower]:
        compiled: Any = torch.compile(module.forward, dynamic=True, backend=backend)
        module.forward = compiled  # the hooks of the module itself stay outside
        module.is_gathered_whole = True  # type: ignore[assignment]  # read by the engine
