"""Reading checkpoints that others wrote, one tensor at a time: safetensors, or torch files with weights_only.

A checkpoint is a mapping of names to readers; nothing is read before it is asked for. Weights of SAM's authors
(`one_2_muliple` = A, `multiple_2_one` = B, `attn` = adaptive adjustment; their spelling) and of BERT are renamed here.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from samtrain.core.errors import CheckpointError, ConfigError
from samtrain.model.packaged import PACKAGED_PREFIX, packaged_folder


class Entry(NamedTuple):
    """A tensor of a checkpoint: its shape, known without reading, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Tensors = Mapping[str, Entry]

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_AUTHORS_GUIDANCE = {
    "one_2_muliple": "guidance.initial_projection",
    "multiple_2_one": "guidance.context_projection",
    "attn": "guidance.patch_score",
}


def resolve_folder(name_or_path: str) -> Path:
    """The local folder of a path, a `packaged:NAME` or a hub name (downloaded to Hugging Face's cache).

    Raises:
        ConfigError: it is none of them, or the hub cannot be reached.
    """
    if name_or_path.startswith(PACKAGED_PREFIX):
        return packaged_folder(name_or_path.removeprefix(PACKAGED_PREFIX))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ConfigError(f"{name_or_path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise ConfigError(
            f"{name_or_path}: not a local folder, and not to be had from the hub ({type(error).__name__}); "
            "give a folder with config.json and weights"
        ) from error


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a Hugging Face folder (sharded or not), or of a single .safetensors, .pth, .pt or .bin file.

    Raises:
        CheckpointError: there are no weights, or a shard that the index names is missing.
    """
    if path.is_file():
        return _read_file(path)
    for name in _SINGLE_FILES:
        index = path / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, Entry] = {}
            for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                if Path(shard).name != shard:
                    raise CheckpointError(f"{index}: shard {shard!r} lies outside the folder; refused")
                if not (path / shard).is_file():
                    raise CheckpointError(f"{index}: names the shard {shard}, which is missing; fetch it again")
                tensors |= _read_file(path / shard)
            return tensors
        if (path / name).is_file():
            return _read_file(path / name)
    raise CheckpointError(f"{path}: no weights here; expected {' or '.join(_SINGLE_FILES)}, or their .index.json")


def guidance_weights(tensors: Tensors) -> Tensors:
    """Guidance parameters of a checkpoint, under our names, whether they have ours or the authors'."""
    found: dict[str, Entry] = {}
    for name, entry in tensors.items():
        if name.startswith("guidance."):
            found[name] = entry
            continue
        match = re.search(r"(?:^|\.)(one_2_muliple|multiple_2_one|attn)\.(weight|bias)$", name)
        if match:
            found[f"{_AUTHORS_GUIDANCE[match[1]]}.{match[2]}"] = entry
    return found


def qformer_from_bert(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Q-Former weights from a BERT checkpoint, as BLIP-2 starts: self-attention and embeddings as they are, the text
    feed-forward copied to the queries' too. Cross-attention and queries have no counterpart.

    Returns:
        the tensors under our names, and BERT's names that have no place here (token types, pooler, heads).
    """
    found: dict[str, Entry] = {}
    unused: list[str] = []
    for name, entry in tensors.items():
        plain = name.removeprefix("bert.")
        if match := re.fullmatch(r"embeddings\.(word_embeddings|position_embeddings|LayerNorm)\.(weight|bias)", plain):
            module = "layernorm" if match[1] == "LayerNorm" else match[1]
            found[f"qformer.embeddings.{module}.{match[2]}"] = entry
        elif match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", plain):
            layer, rest = (
                f"qformer.encoder.layer.{match[1]}",
                match[2].replace("attention.self.", "attention.attention."),
            )
            found[f"{layer}.{rest}"] = entry
            if rest.startswith(("intermediate.", "output.")):
                module, _, tail = rest.partition(".")
                found[f"{layer}.{module}_query.{tail}"] = entry
        else:
            unused.append(name)
    return found, unused


def _read_file(path: Path) -> dict[str, Entry]:
    if path.suffix == ".safetensors":
        handle: Any = safe_open(path, framework="pt")  # memory-mapped, shared by the processes of a node
        return {
            name: Entry(tuple(handle.get_slice(name).get_shape()), partial(handle.get_tensor, name))
            for name in handle.keys()  # noqa: SIM118 - not a mapping
        }
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # files in torch's old format cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: Entry(tuple(value.shape), partial(_give, value)) for name, value in tensors.items()}


def _give(value: Tensor) -> Tensor:
    return value
