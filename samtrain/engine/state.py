"""What a run remembers of itself besides weights: one small JSON object."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from samtrain.core.errors import CheckpointError


@dataclass
class TrainState:
    """Where training stands after `global_step` updates; all counts are over all ranks since the run began.

    cursor: the data order's state after that step (`GlobalStep.cursor`).
    best_metric, best_step: the lowest eval/loss of the checkpoints saved so far, and its step.
    mean_loss: running mean of the loss, for the detection of spikes.
    tracker_run_id: the tracking run that a resumed process goes on with.
    """

    global_step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 0
    num_images: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    num_skipped: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    mean_loss: float | None = None
    tracker_run_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "TrainState":
        """Raises CheckpointError where a key is unknown: the checkpoint comes from another version."""
        unknown = set(values) - {f.name for f in fields(TrainState)}
        if unknown:
            raise CheckpointError(f"the saved state has unknown keys {sorted(unknown)}; use the version that wrote it")
        return TrainState(**values)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint. state: of its step, which may lie behind the run's by now.

    stall_seconds: training stood still for it, on this rank. seconds: from its beginning until the ranks knew of it.
    """

    state: TrainState
    path: Path
    stall_seconds: float
    seconds: float
