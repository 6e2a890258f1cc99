"""The moments at which extras may act; the loop itself knows nothing of them.

Callbacks run on every rank that has them and make no collective calls. `state` is the trainer's own and is read only,
except for `tracker_run_id`, which a tracking callback sets at the start of training.
"""

from pathlib import Path
from typing import Any

from samtrain.core.batch import GlobalStep
from samtrain.engine.state import TrainState


class Callback:
    """Base of all callbacks: every moment does nothing."""

    def on_train_start(self, state: TrainState, plan: dict[str, Any]) -> None:
        """plan: total_steps, first_step, world_size, precision, zero_stage, frozen_towers, device."""

    def on_step_end(
        self, state: TrainState, step: GlobalStep, metrics: dict[str, float], skipped: dict[str, str]
    ) -> None:
        """After every update. metrics: empty between log lines. skipped: key -> reason, of all ranks."""

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """After an evaluation."""

    def on_save(self, state: TrainState, path: Path) -> None:
        """A checkpoint is complete."""

    def on_train_end(self, state: TrainState, status: str) -> None:
        """status: finished, terminated (asked to stop, saved) or failed."""
