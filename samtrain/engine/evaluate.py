"""Validation loss: the same mean per label token as in training, over steps that every rank has equally many of."""

from collections.abc import Iterable

import torch

from samtrain.core.batch import GlobalStep
from samtrain.core.distributed import all_reduce_sum
from samtrain.engine.watchdog import Watchdog
from samtrain.engine.zero import Engine


def evaluate_loss(
    engine: Engine, steps: Iterable[GlobalStep], *, watchdog: Watchdog | None = None, step_number: int = 0
) -> dict[str, float]:
    """eval/loss (mean over all ranks' label tokens) and eval/num_label_tokens, equal on all ranks.

    The module is in eval mode meanwhile, and in train mode after. The watchdog times every batch, and waiting for it.
    """
    if watchdog is not None:
        watchdog.enter("evaluate", step=step_number)
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss_sum, label tokens
    engine.module.eval()
    try:
        with torch.no_grad():
            for step in steps:
                for batch in step.micro_batches:
                    if watchdog is not None:
                        watchdog.enter("evaluate", step=step_number, keys=batch.keys)
                    total[0] += engine.forward(batch.to(engine.device, non_blocking=True)).loss_sum
                    total[1] += batch.num_label_tokens
    finally:
        engine.module.train()
    loss_sum, num_label_tokens = all_reduce_sum(total).tolist()
    return {"eval/loss": loss_sum / max(1.0, num_label_tokens), "eval/num_label_tokens": num_label_tokens}
