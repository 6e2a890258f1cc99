"""The moments at which extras may act; the loop itself knows nothing of them.

Callbacks run on every rank that has them and make no collective calls. `state` is the trainer's own and is read only,
except for `tracker_run_id`, which a tracking callback sets at the start of training.
"""

from typing import Any

from samtrain.core.batch import GlobalStep
from samtrain.engine.state import SavedCheckpoint, TrainState


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

    def before_save(self, state: TrainState) -> None:
        """A checkpoint of `state` is about to be begun: what it relies on must be on disk."""

    def on_save(self, saved: SavedCheckpoint) -> None:
        """A checkpoint is complete; training may have gone on since it was begun."""

    def on_train_end(self, state: TrainState, status: str) -> None:
        """status: finished, terminated (asked to stop, saved) or failed."""
