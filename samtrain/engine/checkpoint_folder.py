"""Which checkpoints an output_dir holds: names, completeness, the pointer, retention.

output_dir/checkpoint-<step>/   complete only with the file COMPLETE, which is written last
output_dir/.checkpoint-<step>.partial/   one that is being written, or was torn
output_dir/latest               the name of the newest one
"""

import re
import shutil
from pathlib import Path

from samtrain.core.errors import CheckpointError, ConfigError

COMPLETE = "COMPLETE"
POINTER = "latest"
FINISHED_FILE = "finished.json"  # beside the checkpoints, when the run has reached its end


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def partial_path(output_dir: Path, step: int) -> Path:
    return output_dir / f".checkpoint-{step}.partial"


def generators_file(rank: int) -> str:
    """The file of a rank's random generators, the last one it writes."""
    return f"rng-{rank:05d}.json"


def is_complete(path: Path) -> bool:
    return (path / COMPLETE).is_file()


def complete_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint, in order of steps."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and is_complete(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find_resume(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start. Torn checkpoints do not exist for it.

    `auto` follows the pointer, which also names the right one after a run went back to an older checkpoint;
    where the pointer is missing or its checkpoint gone, the highest step counts.

    Raises:
        ConfigError: null, and output_dir holds another run's checkpoints.
        CheckpointError: a named checkpoint is missing or incomplete.
    """
    output_dir = Path(output_dir)
    complete = complete_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if complete:
            raise ConfigError(
                f"train.resume_from_checkpoint is null but {output_dir} holds {list(complete.values())[-1].name} of "
                "another run; choose another output_dir, or set it to auto"
            )
        return None
    if resume_from_checkpoint != "auto":
        path = Path(resume_from_checkpoint)
        if not is_complete(path):
            what = f"is incomplete (no file {COMPLETE})" if path.is_dir() else "does not exist"
            raise CheckpointError(f"train.resume_from_checkpoint: {path} {what}; name a complete one, or `auto`")
        return path
    if not complete:
        return None
    pointer = output_dir / POINTER
    named = output_dir / pointer.read_text().strip() if pointer.is_file() else None
    return named if named in complete.values() else list(complete.values())[-1]


def remove_old(output_dir: Path, *, keep: int, newest: int, best: int | None) -> None:
    """Delete all but the newest `keep` complete checkpoints up to `newest`, `best`, and remains of torn ones."""
    complete = complete_checkpoints(output_dir)
    # A run that went back to an older checkpoint leaves steps behind it; they are another history, not this run's.
    kept = {newest, best, *[step for step in complete if step <= newest][-keep:]}
    for step, path in complete.items():
        if step not in kept and step < newest:
            (path / COMPLETE).unlink(missing_ok=True)  # first, so that a half deleted one is no checkpoint
            shutil.rmtree(path, ignore_errors=True)
    for remains in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(remains, ignore_errors=True)
