"""What training tells about itself, and to whom: the `Tracker` every part calls, on rank 0 only.

The rule of this part (design.md, invariant 7): no call waits for a network, no call raises because a server is
down, and nothing that was logged is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Example:
    """A generation to be shown with the images it is about; an image is an open picture or the path of a file."""

    key: str
    images: "Sequence[Image.Image | Path]"
    instruction: str
    prediction: str
    reference: str


class Tracker(Protocol):
    """One run of an experiment."""

    @property
    def run_id(self) -> str | None:
        """The run's identity, to be kept in checkpoints; None while the server has not answered yet."""
        ...

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Values that hold for the whole run; nested mappings become dotted names."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None: ...

    def log_dataset(self, *, name: str, digest: str, path: str, num_samples: int) -> None:
        """The data the run was trained on."""
        ...

    def log_artifact(self, path: str | Path, *, artifact_path: str | None = None) -> None:
        """A file; it is read when it is sent, so it must stay until `finish` has returned."""
        ...

    def log_text(self, text: str, artifact_file: str) -> None: ...

    def log_figure(self, figure: "Figure", artifact_file: str) -> None: ...

    def log_examples(self, examples: Sequence[Example], *, artifact_file: str) -> None:
        """A table of generations that shows the images (`artifact_file` ends with .json)."""
        ...

    def log_model_folder(self, path: str | Path, *, artifact_path: str = "model") -> None:
        """All files of an exported model, like `log_artifact`."""
        ...

    def finish(self, status: RunStatus) -> None:
        """End the run. Waits until everything is sent, or for a bounded time where the server is down."""
        ...


class NullTracker:
    """A `Tracker` for ranks other than 0 and for tests: listens to nobody."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        pass

    def log_dataset(self, *, name: str, digest: str, path: str, num_samples: int) -> None:
        pass

    def log_artifact(self, path: str | Path, *, artifact_path: str | None = None) -> None:
        pass

    def log_text(self, text: str, artifact_file: str) -> None:
        pass

    def log_figure(self, figure: "Figure", artifact_file: str) -> None:
        pass

    def log_examples(self, examples: Sequence[Example], *, artifact_file: str) -> None:
        pass

    def log_model_folder(self, path: str | Path, *, artifact_path: str = "model") -> None:
        pass

    def finish(self, status: RunStatus) -> None:
        pass
