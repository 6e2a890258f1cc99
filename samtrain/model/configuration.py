"""Configuration of the SAM multi-image model: a vision tower, a Q-Former and an LLM, plus the guidance between images.

SAM here is Semantic Alignment (arXiv 2408.12867); transformers' `sam` is Segment Anything, hence `sam_mllm`.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, InstructBlipQFormerConfig, PretrainedConfig

from samtrain.core.errors import ConfigError

try:
    from transformers.configuration_utils import SubConfigSpec
except ImportError:  # transformers 5.17
    SubConfigSpec = None  # type: ignore[assignment, misc]


class SamMllmConfig(PretrainedConfig):
    """Parts as sub-configurations, and guidance as plain fields named after method.md.

    vision_config: any transformers vision configuration (`instructblip_vision_model`, `timm_wrapper`, ...).
    qformer_config: the Q-Former; `encoder_hidden_size` is the width of the vision tower's features.
    text_config: any decoder-only language model.
    guidance_mode: `bidirectional` or `none`. guidance_context: `others`, `all` or `own`.
    initial_layer (l), contextual_layer (k): 1-based, 1 <= l <= k <= layers of the Q-Former.
    order_embedding: whether images carry a learned embedding of their place; max_images: its rows.
    image_layout: `prefix` or `interleaved`; how the processor writes image spans.
    image_token_id: marks the num_query_tokens places of an image in input_ids; may lie beyond the vocabulary.
    eos_token_id, pad_token_id: what generation ends with and pads with.
    """

    model_type = "sam_mllm"
    # transformers 5.23 reads `sub_configs_defaults` and derives `sub_configs` from it; 5.17 reads `sub_configs`.
    if SubConfigSpec is None:
        sub_configs: ClassVar[dict[str, Any]] = {
            "vision_config": AutoConfig,
            "qformer_config": InstructBlipQFormerConfig,
            "text_config": AutoConfig,
        }
    else:
        sub_configs_defaults: ClassVar[dict[str, Any]] = {
            "vision_config": SubConfigSpec(AutoConfig, model_type="instructblip_vision_model"),
            "qformer_config": InstructBlipQFormerConfig,
            "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        }

    vision_config: Any = None  # a configuration, or its dictionary; a configuration from __post_init__ on
    qformer_config: Any = None
    text_config: Any = None
    num_query_tokens: int = 32
    guidance_mode: str = "bidirectional"
    guidance_context: str = "others"
    initial_layer: int = 11
    contextual_layer: int = 11
    order_embedding: bool = False
    max_images: int = 16
    image_layout: str = "prefix"
    image_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _as_config(self.vision_config, default="instructblip_vision_model")
        self.qformer_config = _as_config(self.qformer_config, default="instructblip_qformer")
        self.text_config = _as_config(self.text_config, default="llama")
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        layers = self.qformer_config.num_hidden_layers
        if self.guidance_mode not in ("bidirectional", "none"):
            raise ConfigError(f"guidance_mode = {self.guidance_mode!r}: expected `bidirectional` or `none`")
        if self.guidance_context not in ("others", "all", "own"):
            raise ConfigError(f"guidance_context = {self.guidance_context!r}: expected `others`, `all` or `own`")
        if self.guidance_mode != "none" and not 1 <= self.initial_layer <= self.contextual_layer <= layers:
            raise ConfigError(
                f"guidance needs 1 <= initial_layer (l = {self.initial_layer}) <= contextual_layer "
                f"(k = {self.contextual_layer}) <= {layers}, the layers of the Q-Former"
            )


def _as_config(value: dict[str, Any] | PretrainedConfig | None, *, default: str) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    values = dict(value or {})
    return AutoConfig.for_model(values.pop("model_type", default), **values)
