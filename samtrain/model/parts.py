"""From the `model:` section of a recipe to a configuration and a processor; no weights are read here."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, InstructBlipQFormerConfig, PretrainedConfig

from samtrain.core.errors import ConfigError
from samtrain.model.checkpoints import resolve_folder
from samtrain.model.configuration import SamMllmConfig
from samtrain.model.options import ModelOptions, PartOptions
from samtrain.model.processing import SamMllmProcessor, build_image_processor

WHOLE_MODELS = ("instructblip", "sam_mllm")  # folders that hold all parts
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def build_config(options: ModelOptions) -> SamMllmConfig:
    """The model's configuration: each part from its own source, else from the whole model's, else from `config`.

    Choices that depend on the device are not in it.

    Raises:
        ConfigError: a part has no source, an unknown key, or parts do not fit together.
    """
    base = None
    if options.model_name_or_path:
        base = read_config(options.model_name_or_path)
        if base.model_type not in WHOLE_MODELS:
            raise ConfigError(
                f"model.model_name_or_path: {options.model_name_or_path} holds a {base.model_type!r} model, expected "
                f"{' or '.join(WHOLE_MODELS)}; a single part goes to model.vision, .qformer or .language_model"
            )
    vision = _part_config("vision", options.vision, base)
    qformer = _part_config("qformer", options.qformer, base)
    text = _part_config("language_model", options.language_model, base)
    qformer.encoder_hidden_size = feature_width(vision)
    num_query_tokens = options.qformer.num_query_tokens
    if base is not None and not options.qformer.model_name_or_path:
        num_query_tokens = base.num_query_tokens
    guidance = options.guidance
    return SamMllmConfig(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=num_query_tokens,
        guidance_mode=guidance.mode,
        guidance_context=guidance.context,
        initial_layer=guidance.initial_layer,
        contextual_layer=guidance.contextual_layer,
        order_embedding=guidance.order_embedding,
        max_images=guidance.max_images,
        image_layout=options.image_layout,
    )


def build_processor(options: ModelOptions, *, image_size: int) -> SamMllmProcessor:
    """The processor of a model, without weights; fast enough for preflight.

    Raises:
        ConfigError: a tokenizer is missing or has more words than its embedding, or the vision tower wants another
            image size.
    """
    config = build_config(options)
    wanted = getattr(config.vision_config, "image_size", None)
    if hasattr(config.vision_config, "patch_size") and isinstance(wanted, int) and wanted != image_size:
        raise ConfigError(
            f"data.image_size is {image_size}, but the vision tower has positions for {wanted} px; "
            f"set data.image_size: {wanted}"
        )
    whole = options.model_name_or_path
    tokenizer = _load_tokenizer(
        options.tokenizer_name_or_path or options.language_model.model_name_or_path or whole,
        key="model.tokenizer_name_or_path",
    )
    qformer_tokenizer = _load_tokenizer(
        options.qformer_tokenizer_name_or_path or options.qformer.model_name_or_path or whole,
        key="model.qformer_tokenizer_name_or_path",
        subfolder="qformer_tokenizer",
    )
    for name, words, embedding in (
        ("LLM", _largest_id(tokenizer, but="<image>"), config.text_config.vocab_size),
        ("Q-Former", _largest_id(qformer_tokenizer), config.qformer_config.vocab_size),
    ):
        if words >= embedding:
            raise ConfigError(
                f"the {name} tokenizer has ids up to {words}, its embedding {embedding} rows; they mismatch"
            )
    positions = config.qformer_config.max_position_embeddings
    if options.qformer.max_text_tokens > positions:
        raise ConfigError(
            f"model.qformer.max_text_tokens = {options.qformer.max_text_tokens}: the Q-Former has {positions} positions"
        )
    mean, std = _mean_and_std(options)
    return SamMllmProcessor(
        build_image_processor(image_size=image_size, mean=mean, std=std),
        tokenizer,
        qformer_tokenizer,
        num_query_tokens=config.num_query_tokens,
        image_layout=options.image_layout,
        max_instruction_tokens=options.max_instruction_tokens,
        max_output_tokens=options.max_output_tokens,
        max_text_tokens=options.qformer.max_text_tokens,
    )


def feature_width(config: PretrainedConfig) -> int:
    """Width of the features a vision tower returns."""
    if config.model_type == "timm_wrapper":
        import timm

        with torch.device("meta"):
            return int(timm.create_model(config.architecture, num_classes=0, **(config.model_args or {})).num_features)
    width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]  # a list in convolutional towers
    return int(width)


def _part_config(role: str, part: PartOptions, base: PretrainedConfig | None) -> PretrainedConfig:
    key = {"vision": "vision_config", "qformer": "qformer_config", "language_model": "text_config"}[role]
    overrides = dict(part.config)
    source = part.model_name_or_path
    if source is None and base is None:
        default = {"vision": "instructblip_vision_model", "qformer": "instructblip_qformer"}.get(role)
        model_type = overrides.pop("model_type", default)
        if model_type is None:
            raise ConfigError(
                f"model.{role}: no source; give model_name_or_path, or config with model_type (e.g. llama) and sizes"
            )
        try:
            defaults = AutoConfig.for_model(model_type)
        except ValueError as error:
            raise ConfigError(f"model.{role}.config: {error}") from None
        _check_keys(defaults, overrides, where=f"model.{role}.config")
        return AutoConfig.for_model(model_type, **overrides)  # anew: some defaults follow from others
    config = read_config(source) if source is not None else getattr(base, key)
    if hasattr(config, key):  # a whole model, or CLIP's two towers
        config = getattr(config, key)
    if config.model_type == "timm_wrapper":
        _check_timm(source)
        # timm saves the number of classes too, which transformers passes a second time.
        config.model_args = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
    if role == "qformer" and config.model_type != "instructblip_qformer":
        config = _qformer_like_bert(config, source=str(source))
    return _override(config, overrides, where=f"model.{role}.config")


def _check_timm(source: str | None) -> None:
    """transformers wraps timm's nets, which it must be able to import."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a torchvision of another build raises RuntimeError
        raise ConfigError(
            f"model.vision.model_name_or_path: {source} is a timm checkpoint, which needs timm and a torchvision of "
            f"torch's own build: {error}"
        ) from None


def _override(config: PretrainedConfig, overrides: dict[str, Any], *, where: str) -> PretrainedConfig:
    _check_keys(config, overrides, where=where)
    values = config.to_dict() | overrides
    layers = overrides.get("num_hidden_layers")
    if layers and isinstance(values.get("layer_types"), list):
        values["layer_types"] = values["layer_types"][:layers]
    values.pop("model_type", None)
    return AutoConfig.for_model(config.model_type, **values)


def _check_keys(config: PretrainedConfig, overrides: dict[str, Any], *, where: str) -> None:
    for key in overrides:
        if not hasattr(config, key):
            near = difflib.get_close_matches(key, config.to_dict(), n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"{where}.{key}: a {config.model_type} configuration has no such key{hint}")


def _qformer_like_bert(config: PretrainedConfig, *, source: str) -> InstructBlipQFormerConfig:
    if config.model_type != "bert":
        raise ConfigError(
            f"model.qformer: {source} holds a {config.model_type!r} model, expected InstructBLIP's or BERT"
        )
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob max_position_embeddings initializer_range layer_norm_eps pad_token_id"
    )
    return InstructBlipQFormerConfig(**{name: getattr(config, name) for name in names.split()})


def read_config(name_or_path: str) -> PretrainedConfig:
    """The configuration of a source folder, ours included."""
    from samtrain.model import register

    register()
    folder = resolve_folder(name_or_path)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no usable config.json: {str(error).splitlines()[0]}") from None


def _load_tokenizer(name_or_path: str | None, *, key: str, subfolder: str = "") -> Any:
    if name_or_path is None:
        raise ConfigError(f"{key} is not set, and no part of the model brings a tokenizer; give its folder or hub name")
    folder = resolve_folder(name_or_path)
    if subfolder and (folder / subfolder).is_dir():
        folder = folder / subfolder
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ConfigError(f"{key}: no usable tokenizer in {folder}: {str(error).splitlines()[0]}") from None


def _largest_id(tokenizer: Any, *, but: str | None = None) -> int:
    return max(index for token, index in tokenizer.get_vocab().items() if token != but)


def _mean_and_std(options: ModelOptions) -> tuple[list[float], list[float]]:
    """Normalisation of the vision tower's source where it says, else CLIP's (InstructBLIP's tower is CLIP's)."""
    source = options.vision.model_name_or_path or options.model_name_or_path
    if source is not None:
        for name in ("preprocessor_config.json", "processor_config.json"):
            file: Path = resolve_folder(source) / name
            if file.is_file():
                values = json.loads(file.read_text())
                values = values.get("image_processor", values)
                if "image_mean" in values and "image_std" in values:
                    return values["image_mean"], values["image_std"]
        timm = getattr(read_config(source), "pretrained_cfg", None) or {}
        if "mean" in timm and "std" in timm:
            return list(timm["mean"]), list(timm["std"])
    return _CLIP_MEAN, _CLIP_STD
