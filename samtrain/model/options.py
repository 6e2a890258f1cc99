"""The `model:` section of a recipe: which parts, how they are guided, what trains."""

from typing import Any, Literal

from pydantic import Field, model_validator

from samtrain.core.options import Options


class PartOptions(Options):
    """Where one part of the model comes from.

    model_name_or_path: a local folder or hub name; `packaged:NAME` for weights that a Python package ships
        (packaged:efficientnet-lite0, packaged:minilm-l6, packaged:smollm2-135m-instruct); null for random weights
        of `config`. A vision tower may be a timm checkpoint (`timm/NAME` on the hub).
    config: keys that replace those of the part's configuration (with `model_type` where there is no source).
    """

    model_name_or_path: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class QFormerOptions(PartOptions):
    """The Q-Former (and W-Former: same weights). `num_query_tokens` learned queries per image."""

    num_query_tokens: int = Field(default=32, ge=1)
    max_text_tokens: int = Field(default=128, ge=1)  # instruction tokens the Q-Former reads, cut on the left


class GuidanceOptions(Options):
    """Bidirectional semantic guidance (arXiv 2408.12867, section 3); layers are 1-based as in the paper.

    mode: `bidirectional`, or `none`: every image is extracted independently by the same code.
    context: the images a contextual feature mixes: `others` (the paper), `all` (the authors' release), or `own`, the
        matched control: the W-Former reads the image the Q-Former reads, and nothing passes between images.
    initial_layer (l): before this layer the Q stream steers the W stream. contextual_layer (k >= l): there the W
        stream guides the Q stream.
    order_embedding: ours, not the paper's: a learned embedding of the image's place, read by the W-Former only.
    model_name_or_path: a file or folder with guidance weights, under our names or the authors'.
    """

    mode: Literal["bidirectional", "none"] = "bidirectional"
    context: Literal["others", "all", "own"] = "others"
    initial_layer: int = Field(default=11, ge=1)
    contextual_layer: int = Field(default=11, ge=1)
    order_embedding: bool = False
    max_images: int = Field(default=16, ge=1)  # rows of the order embedding
    model_name_or_path: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "GuidanceOptions":
        if self.initial_layer > self.contextual_layer:
            raise ValueError(
                f"guidance.initial_layer (l = {self.initial_layer}) must not exceed "
                f"guidance.contextual_layer (k = {self.contextual_layer})"
            )
        return self


class LoraOptions(Options):
    """LoRA on the LLM through PEFT; used where `train.language_model: lora`."""

    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TrainablePartsOptions(Options):
    """What trains; the rest is frozen and stays in eval mode. The default is the paper's."""

    guidance: bool = True
    vision: bool = False
    qformer: bool = False  # with the query tokens
    projection: bool = False
    language_model: Literal["frozen", "lora", "full"] = "frozen"
    lora: LoraOptions = LoraOptions()


class ModelOptions(Options):
    """The model of a run.

    model_name_or_path: a folder that `samtrain` exported or a whole InstructBLIP checkpoint (local folder or hub
        name); its parts are loaded by name, and the parts below then only override.
    image_layout: `prefix` (all images first, as the authors do) or `interleaved` (`<image>` placeholders).
    kernels: how the W-Former reads its context; all compute the same function (`kernels.py`). `auto`: Triton on a GPU.
    attn_implementation: attention of the language model (`attention.py`); `auto`: on a GPU flash_attention_2 where
        flash-attn is installed, else flex_attention; on a CPU sdpa.
    compile_vision: torch.compile of a frozen vision tower's layers; `auto`: on a GPU.
    liger: Liger's kernels for the language model's norms, rotary embedding and gated MLP; `auto`: on a GPU where
        liger-kernel is installed and knows the architecture.
    """

    model_name_or_path: str | None = None
    vision: PartOptions = PartOptions()
    qformer: QFormerOptions = QFormerOptions()
    language_model: PartOptions = PartOptions()
    tokenizer_name_or_path: str | None = None  # default: the language model's
    qformer_tokenizer_name_or_path: str | None = None  # default: the Q-Former's
    guidance: GuidanceOptions = GuidanceOptions()
    image_layout: Literal["prefix", "interleaved"] = "prefix"
    train: TrainablePartsOptions = TrainablePartsOptions()
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    kernels: Literal["auto", "triton", "reference", "materialised"] = "auto"
    liger: bool | Literal["auto"] = "auto"
    compile_vision: bool | Literal["auto"] = "auto"
    max_instruction_tokens: int = Field(default=128, ge=1)  # cut on the left, image spans never
    max_output_tokens: int = Field(default=256, ge=2)  # answer + eos, cut on the right
