"""Tells whoever watches the run where it stands, as the events of `core.events`."""

import time
from typing import Any

from samtrain.core.batch import IN_QUARANTINE, GlobalStep
from samtrain.core.events import Emit, message
from samtrain.engine.callbacks.base import Callback
from samtrain.engine.state import SavedCheckpoint, TrainState


class Progress(Callback):
    """Emits `step` events with metrics and the time left, and messages on saves and evaluations."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self._total_steps = self._first_step = 0
        self._since = 0.0

    def on_train_start(self, state: TrainState, plan: dict[str, Any]) -> None:
        self._total_steps, self._first_step = plan["total_steps"], state.global_step
        self._since = time.monotonic()
        if state.global_step:
            self.emit(message(f"resumed after step {state.global_step} of {self._total_steps}"))

    def on_step_end(
        self, state: TrainState, step: GlobalStep, metrics: dict[str, float], skipped: dict[str, str]
    ) -> None:
        for shard, reason in step.quarantined.items():
            self.emit(message(f"step {state.global_step}: shard {shard} is quarantined: {reason}", level="warning"))
        for key, reason in skipped.items():
            if not reason.startswith(IN_QUARANTINE):
                self.emit(message(f"step {state.global_step}: skipped {key}: {reason}", level="warning"))
        if not metrics:
            return
        done = state.global_step - self._first_step
        seconds_per_step = (time.monotonic() - self._since) / max(1, done)
        self.emit(
            {
                "kind": "step",
                "step": state.global_step,
                "max_steps": self._total_steps,
                "metrics": metrics,
                "eta_seconds": seconds_per_step * (self._total_steps - state.global_step),
            }
        )

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
        self.emit(message(f"step {state.global_step}: {shown}"))

    def on_save(self, saved: SavedCheckpoint) -> None:
        times = f"training stood still for {saved.stall_seconds:.2f} s, complete after {saved.seconds:.1f} s"
        self.emit(message(f"saved {saved.path} ({times})"))
