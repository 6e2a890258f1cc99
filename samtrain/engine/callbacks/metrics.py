"""Hands every metric to a function, e.g. a tracker's `log_metrics`."""

from collections.abc import Callable

from samtrain.core.batch import GlobalStep
from samtrain.engine.callbacks.base import Callback
from samtrain.engine.state import TrainState


class Metrics(Callback):
    """Calls `log(metrics, step)` after log lines and evaluations."""

    def __init__(self, log: Callable[[dict[str, float], int], None]) -> None:
        self.log = log

    def on_step_end(
        self, state: TrainState, step: GlobalStep, metrics: dict[str, float], skipped: dict[str, str]
    ) -> None:
        if metrics:
            self.log(metrics, state.global_step)

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.log(metrics, state.global_step)
