"""The training loops that are compared: ours, transformers' InstructBLIP, and a loop in the style of SAM's release.

All are given the same samples, weights of the same values, and the same optimizer. A loop's step is: copy a
micro-batch to the device, forward, backward on loss_sum / (label tokens of the step), for each micro-batch; then the
update. Ours is the trainer's own `run_step` on packed batches.

Legend: S samples, N images of a sample, Q query tokens, T tokens of the longest row.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.train.models import build_instructblip, build_ours
from benchmarks.train.plain_engine import PlainEngine
from benchmarks.train.samples import StepData, places_of
from benchmarks.train.shapes import ModelShape, Train
from samtrain.core.batch import IGNORE_INDEX, GlobalStep
from samtrain.data.collate import ReadySample
from samtrain.engine.options import TrainOptions
from samtrain.engine.step import run_step

Family = Literal["ours", "library", "loop"]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Of one table."""

    shape: ModelShape
    train: Train
    dtype: torch.dtype
    device: torch.device
    checkpointing: bool = False
    made_on: torch.device | None = None  # where modules are made, if not there: on meta they have no memory

    @property
    def place(self) -> torch.device:
        return self.made_on or self.device

    @property
    def options(self) -> TrainOptions:
        precision: Literal["bf16", "fp32"] = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return TrainOptions(precision=precision, gradient_checkpointing=self.checkpointing, learning_rate=1e-6)


class Loop:
    """One way to train. `activate` makes its optimizer, `release` frees it: full training of two does not fit.

    module: has vision_model, language_projection and language_model, by which phases are told apart.
    num_padded_tokens: LLM positions it computes in a step, padding included.
    """

    family: Family = "library"

    def __init__(self, setting: Setting, data: StepData, module: nn.Module) -> None:
        self.setting, self.data, self.module = setting, data, module
        self.engine: Any = None
        self.num_labels = data.num_labels
        self.on_phase: Callable[[str], None] = lambda phase: None  # "forward", "backward", "optimizer"

    @functools.cached_property
    def batches(self) -> list[Any]:
        """The step's micro-batches, on the host."""
        return self.make_batches()

    def make_batches(self) -> list[Any]:
        raise NotImplementedError

    def loss_sum(self, batch: Any) -> Tensor:
        """Summed over the label tokens of a micro-batch that is on the device."""
        raise NotImplementedError

    @property
    def num_padded_tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def activate(self) -> None:
        self.engine = PlainEngine(self.module, options=self.setting.options, device=self.setting.device)

    def release(self) -> None:
        self.engine = None
        for parameter in self.module.parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def to_device(self, batch: Any) -> Any:
        return {
            k: v.to(self.setting.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
        }

    def gradients(self) -> Tensor:
        """Forward and backward of the whole step without an update; returns loss_sum. Gradients are left in `.grad`."""
        total = torch.zeros((), device=self.setting.device)
        for batch in self.batches:
            self.on_phase("forward")
            loss = self.loss_sum(self.to_device(batch))
            self.on_phase("backward")
            (loss / self.num_labels).backward()
            total += loss.detach()
        return total

    def step(self) -> Tensor:
        """One training step; returns loss_sum."""
        total = self.gradients()
        self.on_phase("optimizer")
        self.engine.step()
        return total


class OurLoop(Loop):
    """The trainer's step on packed batches."""

    family = "ours"

    @functools.cached_property
    def global_step(self) -> GlobalStep:
        return self.data.global_step()

    def make_batches(self) -> list[Any]:
        return list(self.global_step.micro_batches)

    @property
    def num_padded_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    def to_device(self, batch: Any) -> Any:
        return batch.to(self.setting.device, non_blocking=True)

    def loss_sum(self, batch: Any) -> Tensor:
        return self.module(**batch.model_inputs()).loss_sum

    def step(self) -> Tensor:
        return self.step_on(self.global_step)

    def step_on(self, step: Any) -> Tensor:
        """As the trainer does it, on any step."""
        watchdog: Any = _Listener(self.on_phase)
        result = run_step(self.engine, step, step_number=1, stop_requested=False, watchdog=watchdog)
        return result.loss_sum


class ZeroLoop(OurLoop):
    """The same under DeepSpeed ZeRO-3 on this one device: the engine of every run. It keeps its optimizer, and weights
    of its own (the same values)."""

    def activate(self) -> None:
        from samtrain.engine import zero
        from samtrain.engine.optimizer import build_parameter_groups
        from samtrain.model.freezing import part_of

        if self.engine is None:
            zero.init_distributed(self.setting.device)
            options = self.setting.options
            groups = build_parameter_groups(self.module.named_parameters(), options, part_of)
            device = self.setting.device
            self.engine = zero.initialize(self.module, options=options, parameter_groups=groups, device=device)
            self.engine.module.train()

    def release(self) -> None:
        if self.engine is not None:
            self.engine.discard_gradients()


class InstructBlipLoop(Loop):
    """transformers' InstructBlipForConditionalGeneration on padded batches of the same samples as our packs."""

    def make_batches(self) -> list[Any]:
        return [pin(padded_rows(samples, self.data.shape)) for samples in self.data.packed()]

    def loss_sum(self, batch: Any) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "num_labels"}
        return self.module(**inputs).loss * batch["num_labels"]  # its loss is the mean over labels


class ReferenceLoop(Loop):
    """In the style of SAM's public code: see `reference.py`."""

    family = "loop"

    def make_batches(self) -> list[Any]:
        """Its five-dimensional image tensor wants samples with equally many images: a batch for each number, of no more
        samples than the largest pack has."""
        by_count: dict[int, list[ReadySample]] = defaultdict(list)
        for sample in self.data.samples:
            by_count[len(sample.images)].append(sample)
        most = max(len(chosen) for chosen in self.data.packs)
        groups = [
            samples[i : i + most] for _, samples in sorted(by_count.items()) for i in range(0, len(samples), most)
        ]
        batches = []
        for samples in groups:
            batch = padded_rows(samples, self.data.shape, prompts_apart=True)
            rows = len(samples)
            batch["pixel_values"] = batch["pixel_values"].unflatten(0, (rows, -1))  # [S, N, 3, H, W]
            step = batch["pixel_values"].shape[1]
            for name in ("qformer_input_ids", "qformer_attention_mask"):
                batch[name] = batch[name][::step]  # [S, Tq], not repeated for every image
            batches.append(pin(batch))
        return batches

    def loss_sum(self, batch: Any) -> Tensor:
        return self.module(batch)


class _Listener:
    """In the watchdog's place: the trainer's step tells it what it does next."""

    def __init__(self, on_phase: Callable[[str], None]) -> None:
        self.on_phase = on_phase

    def enter(self, phase: str, **_: Any) -> None:
        self.on_phase(phase)


def padded_rows(samples: Sequence[ReadySample], shape: ModelShape, *, prompts_apart: bool = False) -> Batch:
    """Rows padded on the right to the longest.

    Args:
        prompts_apart: instructions and answers are padded to the longest of each and then joined, so that a row has
            room for both (LAVIS, on which SAM's code stands).

    Returns:
        input_ids, attention_mask, labels [S, T]; pixel_values [I, 3, H, W]; the instruction for every image,
        qformer_input_ids, qformer_attention_mask [I, Tq]; num_labels (a number).
    """
    places = places_of(shape)
    longest = max(sample.text.num_tokens for sample in samples)
    if prompts_apart:
        prompts = [sample.text.labels.count(IGNORE_INDEX) for sample in samples]
        longest = max(prompts) + max(sample.text.num_tokens - p for sample, p in zip(samples, prompts))
    input_ids = torch.full((len(samples), longest), places.pad_token_id)
    labels = torch.full((len(samples), longest), IGNORE_INDEX)
    attention_mask = torch.zeros((len(samples), longest), dtype=torch.int64)
    longest_text = max(len(sample.text.qformer_input_ids) for sample in samples)
    num_images = sum(len(sample.images) for sample in samples)
    text = torch.full((num_images, longest_text), places.qformer_pad_token_id)
    text_mask = torch.zeros((num_images, longest_text), dtype=torch.int64)
    image = 0
    for row, sample in enumerate(samples):
        length = sample.text.num_tokens
        input_ids[row, :length] = torch.tensor(sample.text.input_ids)
        labels[row, :length] = torch.tensor(sample.text.labels)
        attention_mask[row, :length] = 1
        tokens = torch.tensor(sample.text.qformer_input_ids)
        own = slice(image, image + len(sample.images))
        text[own, : len(tokens)], text_mask[own, : len(tokens)] = tokens, 1
        image = own.stop
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": torch.stack([image for sample in samples for image in sample.images]),
        "qformer_input_ids": text,
        "qformer_attention_mask": text_mask,
        "num_labels": int((labels != IGNORE_INDEX).sum()),
    }


def pin(batch: Batch) -> Batch:
    if not torch.cuda.is_initialized():
        return batch
    return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}


# The rows of a table: name -> how it is made. `like` is ours, whose weights all share.


def make_ours(
    setting: Setting, data: StepData, like: nn.Module | None, *, guided: bool = True, **asked: Any
) -> OurLoop:
    return OurLoop(setting, data, _our_model(setting, like, guided=guided, asked=asked))


def make_zero(setting: Setting, data: StepData, like: nn.Module | None) -> ZeroLoop:
    return ZeroLoop(setting, data, _our_model(setting, None))


def _our_model(
    setting: Setting, like: nn.Module | None, *, guided: bool = True, asked: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    model = build_ours(
        setting.shape, train=setting.train, guided=guided, dtype=setting.dtype, device=setting.place,
        runs_on=setting.device.type, like=like, asked=asked,
    )  # fmt: skip
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_instructblip(setting: Setting, data: StepData, like: nn.Module | None) -> Loop:
    assert like is not None
    model = build_instructblip(
        setting.shape, train=setting.train, dtype=setting.dtype, device=setting.place, attention="sdpa", like=like
    )
    if setting.checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.language_model.train()  # recomputation asks for train mode; the LLM has no dropout
    return InstructBlipLoop(setting, data, model)


def make_reference(setting: Setting, data: StepData, like: nn.Module | None, *, attention: str = "eager") -> Loop:
    from benchmarks.train.reference import ReferenceModel

    assert like is not None
    return ReferenceLoop(setting, data, ReferenceModel(setting, like=like, attention=attention))


@dataclass(frozen=True)
class Row:
    """gate: the row whose loss and gradients it must equal; None: it is the yardstick itself. requires: a package that
    may be missing. on_gpu_alone: why there is nothing to see of it elsewhere."""

    name: str
    label: str
    make: Callable[..., Loop]
    gate: str | None = None
    requires: str = ""
    on_gpu_alone: str = ""


def _without(name: str, part: str, **asked: Any) -> Row:
    """Ours but for one part that a GPU alone runs: what that part gains, and what runs should the part fail there."""
    why = "runs on a GPU alone; elsewhere ours is without it"
    return Row(name, f"ours, without {part}", functools.partial(make_ours, **asked), gate="ours", on_gpu_alone=why)


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("ours", "ours", make_ours, gate="reference_sdpa"),
        Row(
            "ours_unguided", "ours, guidance off",
            lambda *a: make_ours(*a, guided=False), gate="instructblip",
        ),
        Row(
            "ours_zero", "ours under DeepSpeed ZeRO-3", make_zero, gate="ours", requires="deepspeed",
            on_gpu_alone="runs on a GPU alone: the work of ours, and DeepSpeed's own buffers and launches",
        ),
        Row("instructblip", "transformers' InstructBLIP", make_instructblip),
        Row("reference", "reference-style loop", make_reference, gate="reference_sdpa"),
        Row(
            "reference_sdpa", "reference-style loop, SDPA",
            lambda *a: make_reference(*a, attention="sdpa"),
        ),
        _without("ours_dense", "packed attention (SDPA, dense mask)", attn_implementation="sdpa"),
        _without("ours_no_liger", "Liger", liger=False),
        _without("ours_eager_vision", "the compiled tower", compile_vision=False),
        _without("ours_materialised", "our kernels", kernels="materialised"),
    )
}  # fmt: skip
