"""The engine's interface without DeepSpeed, for one device: parameters whole, AdamW on float32 master copies.

The trainer's own `run_step` drives it as it drives `samtrain.engine.zero.Engine`, and so does its Checkpointer.
What DeepSpeed would add on one GPU (hooks, buckets, flat copies) is missing; where it is installed the benchmark
measures that engine too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from samtrain.core.batch import PackedBatch
from samtrain.engine.optimizer import build_parameter_groups
from samtrain.engine.options import TrainOptions
from samtrain.engine.zero import Fragment
from samtrain.model.freezing import part_of

CHUNK_ELEMENTS = 2**29  # of float32 gradients that exist at a time: 2 GiB


class MasterAdamW:
    """AdamW on float32 copies of low-precision parameters, in pieces, so that not all gradients are widened at once."""

    def __init__(self, module: nn.Module, options: TrainOptions) -> None:
        self.named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.options = options
        self.norm = torch.zeros(())
        self.pieces: list[tuple[list[nn.Parameter], list[Tensor], torch.optim.Optimizer]] = []
        betas = (options.adam_beta1, options.adam_beta2)
        for group in build_parameter_groups(self.named, options, part_of):
            settings = {name: value for name, value in group.items() if name != "params"}
            for params in _pieces(group["params"]):
                masters = [p.detach().float().clone() for p in params]
                fused = params[0].device.type == "cuda"
                optimizer = torch.optim.AdamW(
                    [{**settings, "params": masters}], betas=betas, eps=options.adam_epsilon, fused=fused
                )
                self.pieces.append((params, masters, optimizer))

    @torch.no_grad()
    def step(self) -> bool:
        """Clip by the global norm and update; False where the norm is not finite, and nothing was changed."""
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
        if not torch.isfinite(self.norm):  # waits for the device, as DeepSpeed does
            return False
        factor = (self.options.max_grad_norm / (self.norm + 1e-6)).clamp(max=1.0)
        for params, masters, optimizer in self.pieces:
            for p, master in zip(params, masters):
                master.grad = None if p.grad is None else p.grad.float().mul(factor)
            optimizer.step()
            torch._foreach_copy_(list(params), masters)
            optimizer.zero_grad(set_to_none=True)
        return True

    def set_learning_rate(self, factor: float) -> None:
        """Scale every group's own rate by `factor` for the next step."""
        for _, _, optimizer in self.pieces:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def zero_grad(self) -> None:
        for _, parameter in self.named:
            parameter.grad = None

    def num_bytes(self) -> int:
        return sum(12 * p.numel() for _, p in self.named)


class PlainEngine:
    """See `samtrain.engine.zero.Engine`."""

    rank, world_size = 0, 1

    def __init__(self, module: nn.Module, *, options: TrainOptions, device: torch.device) -> None:
        self.module, self.options, self.device = module, options, device
        self.optimizer = MasterAdamW(module, options)
        self.has_overflowed = False
        self._steps = 0

    def forward(self, batch: PackedBatch) -> Any:
        return self.module(**batch.model_inputs())

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.has_overflowed = not self.optimizer.step()
        self._steps += not self.has_overflowed
        self.optimizer.zero_grad()

    @property
    def grad_norm(self) -> float:
        return float(self.optimizer.norm)

    def set_learning_rate(self, factor: float) -> None:
        self.optimizer.set_learning_rate(factor)

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()

    def fragments(self) -> Iterator[Fragment]:
        """Every trainable parameter whole; Adam's state, which torch makes at the first update, must be there."""
        names = {id(p): name for name, p in self.optimizer.named}
        for params, masters, optimizer in self.optimizer.pieces:
            for p, master in zip(params, masters):
                state = optimizer.state[master]
                moments = (state[name].reshape(-1) for name in ("exp_avg", "exp_avg_sq"))
                yield Fragment(names[id(p)], tuple(p.shape), 0, p.numel(), master.reshape(-1), *moments)

    def optimizer_step(self) -> int:
        return self._steps

    def frozen_checksums(self) -> dict[str, tuple[float, float]]:
        """Not computed: the benchmark's weights come from a seed, and DeepSpeed's engine computes them once a run."""
        return {}


def _pieces(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    piece: list[nn.Parameter] = []
    size = 0
    for p in params:
        if piece and size + p.numel() > CHUNK_ELEMENTS:
            yield piece
            piece, size = [], 0
        piece.append(p)
        size += p.numel()
    if piece:
        yield piece
