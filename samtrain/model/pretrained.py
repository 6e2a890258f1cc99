"""Streams pretrained weights into a model by name, whole checkpoints or part by part, and says what came from where.

Two steps, so that only what has no source is initialised: `plan_weights` matches names (nothing is read), then
`load_weights` copies tensor by tensor. Both work on ZeRO-3-partitioned parameters.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from samtrain.core.distributed import rank
from samtrain.core.errors import CheckpointError
from samtrain.core.parameters import Gather, full_shape, is_partitioned
from samtrain.model.checkpoints import (
    Entry,
    Tensors,
    guidance_weights,
    qformer_from_bert,
    read_checkpoint,
    resolve_folder,
)
from samtrain.model.freezing import PARTS, part_of
from samtrain.model.options import ModelOptions
from samtrain.model.parts import WHOLE_MODELS, read_config


@dataclass
class PartReport:
    """One part: where it came from, and the names that were loaded, that its source lacks, that the model has no place
    for (dropped layers among them), and that are new by design (initialised from the seed)."""

    source: str = "random"
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


@dataclass
class LoadReport:
    """What every part was made of."""

    parts: dict[str, PartReport]

    def summary(self) -> list[list[str]]:
        """Rows [part, text] for people."""
        rows = []
        for part, report in self.parts.items():
            counts = [
                f"{len(names)} {word}"
                for word, names in (
                    ("loaded", report.loaded),
                    ("new", report.new),
                    ("missing", report.missing),
                    ("not used", report.unexpected),
                )
                if names
            ]
            rows.append([part, f"{report.source}: {', '.join(counts) or 'no parameters'}"])
        return rows


@dataclass
class WeightPlan:
    """readers: model name -> the tensor to copy there. report: what will have been done."""

    readers: dict[str, Entry]
    report: LoadReport


def plan_weights(model: nn.Module, options: ModelOptions) -> WeightPlan:
    """Match the sources' names with the model's.

    Raises:
        CheckpointError: a source lacks parameters of its part, or one has another shape.
    """
    targets = _targets(model)
    sources, report = _sources(model, options, targets)
    readers = {name: entry for name, entry in sources.items() if name in targets}
    aliases: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        aliases.setdefault(id(tensor), []).append(name)
    for names in aliases.values():
        part = report.parts[part_of(names[0])]
        given = [name for name in names if name in readers]
        for extra in given[1:]:  # tied: one copy is enough
            del readers[extra]
        if given:
            part.loaded.append(given[0])
        elif part.source == "random" or _is_new(names[0], part.source):
            part.new.append(names[0])
        else:
            part.missing.append(names[0])
    _check_shapes(readers, targets, report, options)
    for part_name, part in report.parts.items():
        if part.missing:
            raise CheckpointError(
                f"{part.source}: lacks {len(part.missing)} parameters of {part_name}, "
                f"e.g. {', '.join(part.missing[:3])}; is it the right checkpoint, and do its sizes fit `config`?"
            )
    return WeightPlan(readers, report)


@torch.no_grad()
def load_weights(model: nn.Module, plan: WeightPlan, *, gather: Gather) -> None:
    """Copy the planned tensors, one at a time, in the model's dtype. Of partitioned parameters only rank 0 reads."""
    targets = _targets(model)
    for name, entry in plan.readers.items():
        target = targets[name]
        if not isinstance(target, nn.Parameter):
            target.copy_(entry.read())  # a buffer: every rank has its own
            continue
        with gather([target], modifier_rank=0):
            if rank() == 0 or not is_partitioned(target):
                target.copy_(entry.read())


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, tied ones under each of their names."""
    saved = set(model.state_dict())
    buffers = {n: b for n, b in model.named_buffers() if n in saved}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def _sources(
    model: nn.Module, options: ModelOptions, targets: dict[str, Tensor]
) -> tuple[dict[str, Entry], LoadReport]:
    """Every tensor that some source offers, under the model's names, and a report that lists what has no place."""
    report = LoadReport({part: PartReport() for part in PARTS})
    found: dict[str, Entry] = {}
    if options.model_name_or_path:
        for name, entry in read_checkpoint(resolve_folder(options.model_name_or_path)).items():
            name = name.removeprefix("model.")
            try:
                report.parts[part_of(name)].source = options.model_name_or_path
            except KeyError:
                raise CheckpointError(f"{options.model_name_or_path}: {name} belongs to no part we know") from None
            found[name] = entry
    for part_name, prefixes, part in (
        ("vision", ("vision_model.",), options.vision),
        ("qformer", ("qformer.", "query_tokens"), options.qformer),
        ("language_model", ("language_model.",), options.language_model),
    ):
        if part.model_name_or_path is None:
            continue
        found = {n: r for n, r in found.items() if part_of(n) != part_name}
        report.parts[part_name] = PartReport(source=part.model_name_or_path)
        found |= _part_tensors(part.model_name_or_path, prefixes, targets, report.parts[part_name])
    if options.guidance.model_name_or_path:
        weights = guidance_weights(_file_or_folder(options.guidance.model_name_or_path))
        if not weights:
            raise CheckpointError(f"{options.guidance.model_name_or_path}: holds no guidance parameters")
        report.parts["guidance"] = PartReport(source=options.guidance.model_name_or_path)
        found = {n: r for n, r in found.items() if part_of(n) != "guidance"} | dict(weights)
    for name in [n for n in found if n not in targets]:
        report.parts[part_of(name)].unexpected.append(name)
    return found, report


def _part_tensors(
    source: str, prefixes: tuple[str, ...], targets: dict[str, Tensor], report: PartReport
) -> dict[str, Entry]:
    """Tensors of one part, under the model's names."""
    tensors = read_checkpoint(resolve_folder(source))
    model_type = read_config(source).model_type
    if model_type in WHOLE_MODELS:
        plain = {name.removeprefix("model."): entry for name, entry in tensors.items()}
        return {name: entry for name, entry in plain.items() if name.startswith(prefixes)}
    if prefixes[0] == "qformer." and model_type == "bert":
        renamed, unused = qformer_from_bert(tensors)
        report.unexpected += unused
        return dict(renamed)
    return {_place(name, prefixes[0], targets): entry for name, entry in tensors.items()}


def _place(name: str, prefix: str, targets: dict[str, Tensor]) -> str:
    """The model's name of a tensor of a single-part checkpoint, saved with or without its base model's prefix."""
    candidates = [prefix + name, prefix + name.partition(".")[2]]
    candidates += [f"{prefix}{base}.{name}" for base in ("model", "transformer", "vision_model", "timm_model")]
    return next((c for c in candidates if c in targets), candidates[0])


def _file_or_folder(name_or_path: str) -> Tensors:
    path = Path(name_or_path).expanduser()
    return read_checkpoint(path if path.is_file() else resolve_folder(name_or_path))


def _is_new(name: str, source: str) -> bool:
    """Parameters that a source may lack by design: BERT has no cross-attention and no queries; guidance is ours."""
    if part_of(name) == "guidance":
        return True
    return part_of(name) == "qformer" and _is_bert(source) and (name == "query_tokens" or ".crossattention." in name)


def _is_bert(source: str) -> bool:
    return bool(read_config(source).model_type == "bert")


def _check_shapes(
    readers: dict[str, Entry], targets: dict[str, Tensor], report: LoadReport, options: ModelOptions
) -> None:
    """Refuse other shapes, but for weights between two parts of which one was replaced: those start anew."""
    for name in list(readers):
        target = targets[name]
        wanted = full_shape(target) if isinstance(target, nn.Parameter) else tuple(target.shape)
        shape = readers[name].shape
        if shape == wanted:
            continue
        part = report.parts[part_of(name)]
        joins_vision = options.vision.model_name_or_path and ".crossattention.attention." in name
        joins_text = part_of(name) == "projection"
        if not (joins_vision or joins_text):
            raise CheckpointError(f"{part.source}: {name} has shape {shape}, the model wants {wanted}")
        del readers[name]
        part.loaded.remove(name)
        part.new.append(name)
