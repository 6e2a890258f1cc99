"""One optimizer step: every micro-batch forward and backward, one update.

    loss of the step = (sum of the losses of all label tokens of all ranks) / (number of these tokens)

How that meets DeepSpeed, with W ranks, micro-batches m, and global tokens G: ZeRO-3 averages a micro-batch's
gradients over ranks (its reduce-scatter divides by W) and adds micro-batches up. It divides by
`gradient_accumulation_steps` too, which is 1 here because the boundary is set by hand, so there is no factor
for accumulation. Rank r therefore runs backward on loss_sum[r, m] * W / G, and the accumulated gradient is

    sum_m (1 / W) sum_r d(loss_sum[r, m] * W / G) = d(sum_{r, m} loss_sum[r, m]) / G

whatever W and however the samples are dealt to ranks and micro-batches: one process and several give the same update.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from samtrain.core.batch import GlobalStep, PackedBatch
from samtrain.core.distributed import all_gather_object, all_reduce_sum
from samtrain.core.errors import TrainingError
from samtrain.core.seeds import rng_state, set_rng_state
from samtrain.engine.watchdog import Watchdog
from samtrain.engine.zero import Engine


@dataclass(frozen=True)
class StepCounts:
    """Sums over all ranks of one step; what rides in the one small all-reduce."""

    label_tokens: int
    tokens: int
    images: int
    samples: int
    skipped: int
    stop_requests: int
    saves_ended: int  # ranks that know how the save under way has ended


class ReducedCounts:
    """A step's counts, summed over ranks: on the device for the loss, on the host for who asks after the step."""

    def __init__(self, mine: StepCounts, *, device: torch.device) -> None:
        host = torch.tensor(astuple(mine), dtype=torch.int64)
        if device.type == "cuda":
            host = host.pin_memory()  # from ordinary memory PyTorch's copy would wait for all that is queued
        total = all_reduce_sum(host.to(device, non_blocking=True))
        self.label_tokens: Tensor = total[0]  # the first field of StepCounts
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            # The copy waits for nobody now; by the end of the step it has long arrived.
            self._host = torch.empty(len(total), dtype=torch.int64, pin_memory=True)
            self._host.copy_(total, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = total

    def read(self) -> StepCounts:
        if self._event is not None:
            self._event.synchronize()
        return StepCounts(*self._host.tolist())


@dataclass(frozen=True)
class StepResult:
    """loss_sum: 0-d float32 on the device, this rank's sum over label tokens. counts: over all ranks."""

    loss_sum: Tensor
    counts: StepCounts


def count(step: GlobalStep, *, stop_requested: bool, save_has_news: bool) -> StepCounts:
    """This rank's share of the counts."""
    batches = step.micro_batches
    return StepCounts(
        label_tokens=sum(batch.num_label_tokens for batch in batches),
        tokens=sum(batch.num_tokens for batch in batches if not batch.is_empty),
        images=sum(batch.num_images for batch in batches),
        samples=sum(len(batch.keys) for batch in batches),
        skipped=len(step.skipped),
        stop_requests=int(stop_requested),
        saves_ended=int(save_has_news),
    )


def run_step(
    engine: Engine,
    step: GlobalStep,
    *,
    step_number: int,
    watchdog: Watchdog,
    stop_requested: bool = False,
    save_has_news: bool = False,
) -> StepResult:
    """Forward, backward and update on `step`; fillers run too, so that all ranks make the same calls.

    Nothing waits for the device here except DeepSpeed's own check of the gradient norm, and then the counts, which have
    arrived by then.

    Raises:
        TrainingError: the gradient norm is not finite, on every rank alike; the update was not applied.
    """
    mine = count(step, stop_requested=stop_requested, save_has_news=save_has_news)
    counts = ReducedCounts(mine, device=engine.device)
    scale = engine.world_size / counts.label_tokens.clamp(min=1)
    losses = []
    for i, batch in enumerate(step.micro_batches):
        watchdog.enter("forward", step=step_number, keys=batch.keys)
        loss_sum = engine.forward(batch.to(engine.device, non_blocking=True)).loss_sum
        watchdog.enter("backward", step=step_number, keys=batch.keys)
        engine.backward(loss_sum * scale, is_last=i == len(step.micro_batches) - 1)
        losses.append(loss_sum.detach())
    watchdog.enter("optimizer", step=step_number, keys=step.keys)
    engine.step()
    if engine.has_overflowed:
        raise TrainingError(describe_not_finite(step, losses, step_number=step_number))
    return StepResult(torch.stack(losses).sum(), counts.read())


def describe_not_finite(step: GlobalStep, losses: list[Tensor], *, step_number: int) -> str:
    """Names the samples whose loss is not finite on any rank, or else all of the step (a collective)."""
    mine = [batch.keys for batch, loss in zip(step.micro_batches, losses) if not torch.isfinite(loss)]
    suspects = [(rank, keys) for rank, found in enumerate(all_gather_object(mine)) for keys in found]
    where = "; ".join(f"rank {rank}: {', '.join(keys) or '(filler)'}" for rank, keys in suspects)
    return (
        f"step {step_number}: the gradient norm is not finite and the update was not applied. "
        + (f"The loss is not finite for {where}. " if where else "Every loss is finite. ")
        + f"Keys of the step: {', '.join(step.keys)}. "
        "Look at these samples; else lower train.learning_rate or train with precision fp32."
    )


def warm_up(engine: Engine, batch: PackedBatch, *, watchdog: Watchdog) -> None:
    """Forward and backward of the largest batch without an update, so that a lack of memory shows at once.

    Every rank calls it with a batch of its own. After `discard_gradients` DeepSpeed overwrites what backward left
    instead of adding to it, so that nothing of it remains (tested).
    """
    watchdog.enter("warm-up", step=0, keys=batch.keys)
    drawn = rng_state()  # a resumed run warms up too: dropout must not draw other numbers afterwards
    engine.backward(engine.forward(batch.to(engine.device)).loss_sum, is_last=False)
    engine.discard_gradients()
    set_rng_state(drawn)
