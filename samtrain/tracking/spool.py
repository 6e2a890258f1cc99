"""The journal between training and a tracking server: what was logged is on disk before anyone tries to send it.

A spool is a folder (`<output_dir>/tracking`) that exists while something was logged but has not arrived:
    spool.jsonl   one operation a line, in the order of the calls; only appended to
    state.json    how many bytes of it the server has taken, and the run's id
    files/        content that operations refer to (figures, images of examples)

The caller's side is `append`: one write to a local file, never a wait. The sender's side is `read` and
`acknowledge`. A spool that was sent whole is deleted; what is left after a crash or an outage is sent by the resumed
run, or by `python -m samtrain.tracking.replay`.
"""

import json
import os
import shutil
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtrain.core.files import atomic_write_json

Operation = dict[str, Any]


@dataclass(frozen=True)
class SpoolState:
    """acknowledged: bytes of the journal the server has taken. run_id: None until the run exists there."""

    acknowledged: int = 0
    run_id: str | None = None
    tracking_uri: str | None = None


class Spool:
    """One journal. `append` may be called from any thread; `read` and `acknowledge` from one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "spool.jsonl"
        self.files = self.folder / "files"
        self._state_path = self.folder / "state.json"
        self._lock = threading.Lock()
        self._cut_torn_line()
        self.state = SpoolState()
        if self._state_path.exists():
            self.state = SpoolState(**json.loads(self._state_path.read_text()))

    def append(self, operation: Operation) -> None:
        """Write one operation at the end; it survives this process from here on."""
        line = (json.dumps(operation, ensure_ascii=False) + "\n").encode()
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as stream:
                stream.write(line)

    def read(self, *, limit: int = 500) -> list[tuple[Operation, int]]:
        """The next operations that were not acknowledged, each with the journal's length in bytes after it."""
        if not self.path.exists():
            return []
        found: list[tuple[Operation, int]] = []
        position = self.state.acknowledged
        with open(self.path, "rb") as stream:
            stream.seek(position)
            for line in stream:
                if len(found) == limit or not line.endswith(b"\n"):  # a line that is being written
                    break
                position += len(line)
                try:
                    operation = json.loads(line)
                except ValueError:
                    operation = {"op": "damaged", "line": line.decode(errors="replace")}
                found.append((operation, position))
        return found

    @property
    def is_drained(self) -> bool:
        return not self.path.exists() or self.state.acknowledged >= self.path.stat().st_size

    def acknowledge(self, position: int, *, run_id: str | None, tracking_uri: str) -> None:
        """Remember that everything before byte `position` has arrived."""
        self.state = SpoolState(position, run_id, tracking_uri)
        atomic_write_json(self._state_path, vars(self.state))

    def new_file(self, name: str) -> Path:
        """A place of its own for content that an operation will refer to."""
        folder = self.files / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder / name

    def stored_path(self, path: str | Path) -> str:
        """`path` as operations hold it: relative where it lies in the run's folder, so that this can be moved."""
        absolute, run_folder = Path(path).absolute(), self.folder.absolute().parent
        return (
            os.path.relpath(absolute, self.folder.absolute()) if absolute.is_relative_to(run_folder) else str(absolute)
        )

    def real_path(self, stored: str) -> Path:
        return Path(os.path.normpath(self.folder.absolute() / stored))

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def set_aside(self) -> Path:
        """Rename a spool that belongs to another run, so that it can still be replayed; returns its new folder."""
        aside = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
        self.folder.rename(aside)
        self.state = SpoolState()
        return aside

    def _cut_torn_line(self) -> None:
        """Drop an operation that a crash cut off in the middle, or the next one would be glued to it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(self.path, whole)
