"""What forward and backward of one pack hold beside weights, gradients and optimizer: counted, nothing is computed.

The model of the options runs on fake tensors (shapes and dtypes, no data), so a 7B model needs neither weights nor a
GPU. Every gradient is let go of as soon as it is there, as ZeRO-3 does, which moves it to its bucket. What is counted
is what a GPU would run, as far as tensors on a CPU can show it:

- flash_attention_2 and flex_attention: a stand-in allocates and keeps what flash-attention 2 does, without a mask.
  eager, and sdpa with its dense mask, run as they are.
- Liger's norms and gated MLPs: Liger's own code, whose kernels are not launched. Its rotary embedding is transformers'
  here, as on any CPU. Where liger-kernel is not installed, nothing of it is counted, which is more.
- Our Triton kernels are operations that know their shapes.
- A tower that would be compiled is counted uncompiled, which is more.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from samtrain.core.batch import ImageGroups, PackedBatch
from samtrain.model.attention import choose_attention
from samtrain.model.build import build_empty
from samtrain.model.kernels import choose_kernels
from samtrain.model.liger import apply_liger, choose_liger
from samtrain.model.live_bytes import LiveBytes, make_fake
from samtrain.model.modeling import SamMllmForConditionalGeneration
from samtrain.model.options import ModelOptions

_WITHOUT_MASK = ("flash_attention_2", "flex_attention")


@dataclass(frozen=True)
class Activations:
    """num_bytes: at the highest point of forward and backward, the batch included. counted: what ran, in words."""

    num_bytes: int
    counted: str


def count_activations(
    options: ModelOptions, batch: PackedBatch, *, dtype: torch.dtype, gradient_checkpointing: bool
) -> Activations:
    """Of a training step's micro-batch on a GPU; `batch` is real, and on the CPU."""
    model = build_empty(options, dtype=dtype)
    model.config.image_token_id = batch.image_token_id
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.kernels = choose_kernels(
        options.kernels, model.config.qformer_config, device_type="cuda", qformer_trains=options.train.qformer
    )
    attention = options.attn_implementation
    if attention == "auto":
        attention = choose_attention("auto", model.config.text_config, device_type="cuda")
    # Whether what is asked for is installed is the workers' matter.
    is_liger, _ = choose_liger(options.liger and "auto", model.config.text_config, device_type="cuda")
    if is_liger:
        apply_liger(model.language_model)
    with _attention_standing_in(model, attention), _no_launches():
        num_bytes = count_step(model.train(), batch)
    counted = f"attention {attention}, kernels {model.kernels}, {'with' if is_liger else 'without'} Liger"
    return Activations(num_bytes, counted)


def count_step(model: SamMllmForConditionalGeneration, batch: PackedBatch) -> int:
    """Peak bytes of forward and backward of a model on the meta device, whose tensors become fake ones."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        make_fake(model, torch.device("cpu"))
    live = LiveBytes(given=[*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_let_go)
    inputs = {name: _fake(value, mode) for name, value in batch.model_inputs().items()}
    # Fake tensors choose as the CPU does: its flash attention saves what the GPU's saves.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), mode, live:
        for tensor in tree_iter([vars(v) if isinstance(v, ImageGroups) else v for v in inputs.values()]):
            if isinstance(tensor, Tensor):
                live.add(tensor)
        model(**inputs).loss_sum.backward()
    return live.peak


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, ImageGroups):
        return ImageGroups(**{name: mode.from_tensor(tensor) for name, tensor in vars(value).items()})
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _attention_standing_in(model: SamMllmForConditionalGeneration, attention: str) -> Iterator[None]:
    """What runs in place of attention without a mask, under the name that transformers makes no mask for."""
    if attention not in _WITHOUT_MASK:
        yield
        return
    name = "flash_attention_2"
    model.language_model.config._attn_implementation = name
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {name: _attend}):
        yield


@contextlib.contextmanager
def _no_launches() -> Iterator[None]:
    """Triton's kernels are given their tensors and not launched: these have no data."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with mock.patch.object(JITFunction, "run", _nothing), mock.patch.object(InterpretedFunction, "run", _nothing):
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' interface: [B, H, T, D], of keys and values as many heads as they have -> [B, T, H, D]."""
    return _FlashAllocations.apply(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)), None


class _FlashAllocations(torch.autograd.Function):
    """Allocates and keeps what flash-attention 2 does, and computes nothing; [B, T, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, log_sums = ctx.saved_tensors
        accumulator = query.new_empty(query.shape, dtype=torch.float32)  # of the query's gradient
        sums = torch.empty_like(log_sums)
        of_heads = () if key.shape == query.shape else (torch.empty_like(query), torch.empty_like(query))
        results = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
        del accumulator, sums, of_heads
        return results
