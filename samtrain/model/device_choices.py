"""The keys of `model` that depend on the device a run is on, decided in one place: for the plan and for the model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from samtrain_kernels.dispatch import ResolvedBackend

from samtrain.model.attention import Implementation, choose_attention
from samtrain.model.compilation import choose_compile_vision, compile_layers
from samtrain.model.configuration import SamMllmConfig
from samtrain.model.kernels import choose_kernels
from samtrain.model.liger import apply_liger, choose_liger
from samtrain.model.options import ModelOptions

if TYPE_CHECKING:
    from samtrain.model.modeling import SamMllmForConditionalGeneration


@dataclass(frozen=True)
class DeviceChoices:
    """What runs on `device_type`. liger, compile_vision: in words, with the reason where they are off."""

    device_type: str
    kernels: ResolvedBackend
    attention: Implementation
    is_liger: bool
    liger: str
    compiles_vision: bool
    compile_vision: str

    def apply(self, model: "SamMllmForConditionalGeneration") -> None:
        """Change the modules that exist; attention is left out: the configuration has it before there are any."""
        model.kernels = self.kernels
        if self.is_liger:
            apply_liger(model.language_model)
        if self.compiles_vision:
            compile_layers(model.vision_model)

    def rows(self, options: ModelOptions) -> list[list[str]]:
        """For a plan, beside what was asked for: [[name, value], ...]."""
        where = f"on {self.device_type}"
        return [
            ["kernels", f"{self.kernels} {where} (model.kernels: {options.kernels})"],
            ["attention", f"{self.attention} {where} (model.attn_implementation: {options.attn_implementation})"],
            ["liger", self.liger],
            ["compiled vision", self.compile_vision],
        ]

    def to_dict(self) -> dict[str, str]:
        """For a tracking run or a result file."""
        names = ("kernels", "attention", "liger", "compile_vision")
        return {name: str(getattr(self, name)) for name in names}


def choose_for_device(options: ModelOptions, config: SamMllmConfig, *, device_type: str) -> DeviceChoices:
    """What `kernels`, `attn_implementation`, `liger` and `compile_vision` come to on `device_type` ("cuda", "cpu").

    Raises:
        ConfigError: what is asked for cannot run there.
    """
    kernels = choose_kernels(
        options.kernels, config.qformer_config, device_type=device_type, qformer_trains=options.train.qformer
    )
    attention = choose_attention(options.attn_implementation, config.text_config, device_type=device_type)
    is_liger, liger = choose_liger(options.liger, config.text_config, device_type=device_type)
    compiles_vision, compile_vision = choose_compile_vision(
        options.compile_vision, vision_trains=options.train.vision, device_type=device_type
    )
    return DeviceChoices(device_type, kernels, attention, is_liger, liger, compiles_vision, compile_vision)
