"""Export to a Hugging Face folder, tensor by tensor, and back.

`export_folder` holds one shard in memory, whatever the size of the model: tensors arrive from an iterator (under
ZeRO-3 each is gathered for its turn and only rank 0 sees it), fill a shard, and the shard is written. The folder
appears whole or not at all. What must be in it is known from the configuration, so a gap is an error, not a model
with random weights in it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samtrain.core.distributed import broadcast_object, is_main_process
from samtrain.core.errors import CheckpointError
from samtrain.core.files import atomic_write_json, fsync_directory
from samtrain.generation.options import GenerationOptions

if TYPE_CHECKING:
    from samtrain.model import SamMllmConfig, SamMllmForConditionalGeneration, SamMllmProcessor

WEIGHTS_INDEX = "model.safetensors.index.json"


def export_folder(
    config: "SamMllmConfig",
    processor: "SamMllmProcessor",
    named_tensors: Iterator[tuple[str, Tensor | None]],
    folder: str | Path,
    *,
    dtype: torch.dtype,
    generation: GenerationOptions | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config, weights, tokenizers, image processor and generation settings; replaces `folder`.

    To be called by all ranks: they iterate together, rank 0 writes.

    Args:
        named_tensors: final names (LoRA merged) with whole tensors on rank 0 and anything elsewhere; parameters and
            persistent buffers. Of tied tensors (lm_head and embeddings) one or all; one is stored.
        dtype: floating tensors are stored in it.
        generation: settings a user of the folder starts from; default: the evaluation protocol's.

    Raises:
        CheckpointError: on every rank: the tensors do not fit the configuration, or the disk has no room.
    """
    error: Exception | None = None
    writer: _Writer | None = None
    try:
        if is_main_process():
            writer = _Writer(config, Path(folder), dtype=dtype, max_shard_bytes=max_shard_bytes)
    except Exception as raised:
        error = raised
    for name, tensor in named_tensors:
        # After an error rank 0 still takes its part in gathering, or the other ranks would wait for it for ever.
        if writer is not None and error is None:
            try:
                writer.add(name, tensor)
            except Exception as raised:
                error = raised
    if writer is not None:
        try:
            if error is None:
                writer.finish(processor, generation or GenerationOptions())
        except Exception as raised:
            error = raised
        finally:
            shutil.rmtree(writer.temporary, ignore_errors=True)
    said = broadcast_object(None if error is None else f"{error}")
    if error is not None:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{folder}: {said}") from error
    if said is not None:
        raise CheckpointError(f"rank 0 could not export: {said}")


class _Writer:
    """Rank 0's side: shards into a temporary sibling folder, renamed at the end."""

    def __init__(self, config: "SamMllmConfig", folder: Path, *, dtype: torch.dtype, max_shard_bytes: int) -> None:
        self.config, self.folder, self.dtype, self.max_shard_bytes = config, folder.absolute(), dtype, max_shard_bytes
        self.shapes, self.tied = expected_tensors(config)
        self._check_room()
        self.temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = self._total_bytes = 0
        self._files: list[list[str]] = []  # names of the tensors in each shard
        self._stored: set[str] = set()

    def add(self, name: str, tensor: Tensor | None) -> None:
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: {name} has no place in the model that the configuration describes")
        if tensor is None or tuple(tensor.shape) != self.shapes[name]:
            found = None if tensor is None else tuple(tensor.shape)
            raise CheckpointError(
                f"{self.folder}: {name} has shape {found}, the configuration says {self.shapes[name]}"
            )
        if self.tied.get(name, name) in self._stored:
            return
        self._stored.add(self.tied.get(name, name))
        tensor = tensor.detach().to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self.max_shard_bytes:
            self._write_shard()
        self._shard[name] = tensor
        self._shard_bytes += size
        self._total_bytes += size

    def finish(self, processor: "SamMllmProcessor", generation: GenerationOptions) -> None:
        missing = sorted({self.tied.get(name, name) for name in self.shapes} - self._stored)
        if missing:
            raise CheckpointError(f"{self.folder}: {len(missing)} tensors are missing: {', '.join(missing[:5])} ...")
        self._write_shard()
        self._name_shards()
        values = self.config.to_dict() | {"architectures": ["SamMllmForConditionalGeneration"]}
        type(self.config).from_dict(values | {"dtype": str(self.dtype).removeprefix("torch.")}).save_pretrained(
            self.temporary
        )
        processor.save_pretrained(self.temporary)
        _generation_config(self.config, processor, generation).save_pretrained(self.temporary)
        self._publish()

    def _write_shard(self) -> None:
        from safetensors.torch import save_file

        path = self.temporary / _shard_name(len(self._files))
        save_file(self._shard, path, metadata={"format": "pt"})
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        self._files.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _name_shards(self) -> None:
        """Give shards their names, which hold the number of all; one shard needs no index."""
        if len(self._files) == 1:
            (self.temporary / _shard_name(0)).rename(self.temporary / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            final = f"model-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            (self.temporary / _shard_name(number)).rename(self.temporary / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        atomic_write_json(self.temporary / WEIGHTS_INDEX, index)

    def _check_room(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        element = torch.empty(0, dtype=self.dtype).element_size()
        needed = sum(torch.Size(self.shapes[name]).numel() * element for name in self.shapes if name not in self.tied)
        free = shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise CheckpointError(f"{self.folder}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")

    def _publish(self) -> None:
        """Rename into place; an earlier export steps aside and is removed only afterwards."""
        old = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(old)
        self.temporary.rename(self.folder)
        fsync_directory(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def expected_tensors(config: "SamMllmConfig") -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Name -> shape of every parameter and persistent buffer, and name -> the name it shares its memory with."""
    from samtrain.model import SamMllmForConditionalGeneration

    with torch.device("meta"):
        model = SamMllmForConditionalGeneration(config)
    model.tie_weights()
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        shapes[name] = tuple(tensor.shape)
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return shapes, tied


def load_exported(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> "tuple[SamMllmForConditionalGeneration, SamMllmProcessor]":
    """Model (in eval mode) and processor of an exported folder, without network or code from the folder.

    Args:
        dtype: None: the stored one on a GPU, float32 on a CPU (slow or missing kernels otherwise).

    Raises:
        CheckpointError: the folder is not one of ours, is incomplete, or holds other tensors than its config says.
    """
    from samtrain.model import SamMllmForConditionalGeneration, SamMllmProcessor

    folder, device = Path(folder), torch.device(device)
    check_exported(folder)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    try:
        loaded: Any = SamMllmForConditionalGeneration.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        model, report = loaded
        processor = SamMllmProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # safetensors, json, transformers: each has its own kinds
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: cannot be loaded: {first[0]}") from error
    _check_report(folder, report)
    return model.to(device).eval(), processor


def check_exported(folder: str | Path) -> None:
    """Raise CheckpointError where `folder` is no exported model; reads nothing but its config."""
    folder = Path(folder)
    hint = "give a folder that a run exported (`model` in its output_dir)"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; {hint}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no config.json, so it is no exported model; {hint}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "sam_mllm":
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {found!r}, expected 'sam_mllm'; {hint}")


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            keys = sorted(str(key) for key in report[kind])
            what = kind.removesuffix("_keys")
            raise CheckpointError(f"{folder}: {len(keys)} {what} tensors, e.g. {', '.join(keys[:3])}")


def _generation_config(config: "SamMllmConfig", processor: "SamMllmProcessor", options: GenerationOptions) -> Any:
    from transformers import GenerationConfig

    eos = processor.eos_token_id if config.eos_token_id is None else config.eos_token_id
    return GenerationConfig(
        **options.model_dump(), do_sample=False, eos_token_id=eos, pad_token_id=processor.pad_token_id
    )


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
