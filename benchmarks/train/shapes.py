"""The models of the benchmark, with random weights: InstructBLIP's parts at their real sizes, and a toy for CPUs.

What trains (`--train`), and what a peer without guidance trains beside it, so that the backward pass through the LLM
is the same:

    frozen   ours: guidance (the paper's setting).            a peer: the projection, which sits at the same place
    lora     ours: guidance, Q-Former, projection, LoRA.      a peer: the same without guidance
    full     ours: guidance, Q-Former, projection, the LLM.   a peer: the same without guidance

The vision tower is always frozen.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import InstructBlipConfig, InstructBlipQFormerConfig, InstructBlipVisionConfig, LlamaConfig

from samtrain.model.configuration import SamMllmConfig
from samtrain.model.options import TrainablePartsOptions

Train = Literal["frozen", "lora", "full"]
TRAINS: tuple[Train, ...] = get_args(Train)


@dataclass(frozen=True)
class ModelShape:
    """vision, qformer, text: keyword arguments of transformers' configurations.

    initial_layer, contextual_layer: l and k of guidance, 1-based. context: which images it mixes.
    max_tokens, max_images: budgets of a pack, from the recipes. samples: of a step.
    """

    name: str
    vision: dict[str, Any]
    qformer: dict[str, Any]
    text: dict[str, Any]
    num_query_tokens: int = 32
    initial_layer: int = 11
    contextual_layer: int = 11
    context: str = "others"
    max_tokens: int = 8192
    max_images: int = 64
    samples: int = 64
    note: str = ""

    @property
    def image_token_id(self) -> int:
        """The last word of the vocabulary, as in InstructBLIP's own checkpoints."""
        return int(self.text["vocab_size"]) - 1

    @property
    def image_size(self) -> int:
        return int(self.vision.get("image_size", 224))

    def parts(self) -> dict[str, Any]:
        vision = InstructBlipVisionConfig(**self.vision)
        return {
            "vision_config": vision,
            "qformer_config": InstructBlipQFormerConfig(**self.qformer, encoder_hidden_size=vision.hidden_size),
            "text_config": LlamaConfig(**self.text),
            "num_query_tokens": self.num_query_tokens,
        }

    def config(self, *, guided: bool, attention: str = "sdpa") -> SamMllmConfig:
        """Ours."""
        config = SamMllmConfig(
            **self.parts(),
            guidance_mode="bidirectional" if guided else "none",
            guidance_context=self.context,
            initial_layer=self.initial_layer,
            contextual_layer=self.contextual_layer,
            image_token_id=self.image_token_id,
            eos_token_id=2,
            pad_token_id=0,
        )
        config._attn_implementation = attention
        return config

    def instructblip_config(self, *, attention: str) -> InstructBlipConfig:
        """transformers' own."""
        config = InstructBlipConfig(**self.parts(), image_token_index=self.image_token_id)
        config._attn_implementation = attention
        return config


def trains(train: Train, *, guided: bool) -> TrainablePartsOptions:
    """What the module's docstring says, of ours (`guided`) or of a peer."""
    if train == "frozen":
        return TrainablePartsOptions(guidance=guided, projection=not guided)
    return TrainablePartsOptions(guidance=guided, qformer=True, projection=True, language_model=train)


def _vicuna(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 32001,  # 32,000 words and the image's
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


_ALL = (
    ModelShape("7b", {}, {}, _vicuna(4096, 11008, 32, 32), note="EVA-ViT-g, Q-Former, Vicuna-7B"),
    ModelShape("13b", {}, {}, _vicuna(5120, 13824, 40, 40), note="EVA-ViT-g, Q-Former, Vicuna-13B"),
    ModelShape(
        "tiny",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
        },
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 256,
        },
        _vicuna(64, 128, 2, 4) | {"vocab_size": 97},
        num_query_tokens=4,
        initial_layer=3,
        contextual_layer=3,
        max_tokens=256,
        max_images=16,
        samples=8,
        note="toy widths: it says whether the code runs, and nothing about speed",
    ),
)
SHAPES: dict[str, ModelShape] = {shape.name: shape for shape in _ALL}
