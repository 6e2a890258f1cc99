"""Which parameter trains how fast: AdamW's parameter groups, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from samtrain.engine.options import TrainOptions


def build_parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], options: TrainOptions, part_of: Callable[[str], str]
) -> list[dict[str, Any]]:
    """One group per part and kind of decay, of the parameters that require gradients, in the module's order.

    1-D parameters (biases, norms) are not decayed. `lr` and `initial_lr` are the part's own rate
    (`learning_rates`, else `learning_rate`); `name` is `<part>` or `<part>/no_decay`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for parameter_name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        part = part_of(parameter_name)
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # partitioned, its own shape is [0]
        name = part if decays else f"{part}/no_decay"
        if name not in groups:
            rate = options.learning_rates.get(part, options.learning_rate)  # type: ignore[call-overload]
            decay = options.weight_decay if decays else 0.0
            groups[name] = {"name": name, "params": [], "lr": rate, "initial_lr": rate, "weight_decay": decay}
        groups[name]["params"].append(parameter)
    return list(groups.values())


def learning_rate_factor(step: int, options: TrainOptions, total_steps: int) -> float:
    """What the learning rates are multiplied with in the update after `step` finished ones (0 for the first).

    A linear warm-up reaches 1 with its last update and never wastes one at 0; then `lr_scheduler_type` falls
    from 1 to `min_lr_ratio` at `total_steps`.
    """
    warmup = num_warmup_steps(options, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if options.lr_scheduler_type == "constant":
        return 1.0
    falling = 1.0 - progress if options.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.min_lr_ratio + (1.0 - options.min_lr_ratio) * falling


def num_warmup_steps(options: TrainOptions, total_steps: int) -> int:
    """`warmup_steps`, or `warmup_ratio` of all steps, rounded up."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    return math.ceil(options.warmup_ratio * total_steps)
