"""The ledger: which samples each step used and which it skipped, and why, and which shards were given up.

One JSON line per global step. Each carries a running hash over all used keys in order and all skips so far, so two
runs compare by one hash, and a resumed run proves that it continues the same history. Rank 0 writes it, with the skips
of all ranks gathered.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from samtrain.core.errors import CheckpointError

START_DIGEST = hashlib.blake2b(b"samtrain ledger 1", digest_size=16).hexdigest()
_WAY_OUT = "restore the ledger that belongs to the checkpoint, or start a new run in another output_dir"


class Ledger:
    """An open ledger; get one from `Ledger.open`."""

    def __init__(self, path: Path, stream: BinaryIO, *, digest: str, step: int) -> None:
        self.path = path
        self.digest = digest  # over everything recorded so far
        self.step = step  # the last one recorded
        self._stream = stream

    @staticmethod
    def open(path: str | Path, *, resume_step: int | None = None) -> "Ledger":
        """Open the ledger of a run that continues after `resume_step`, or starts afresh (None or 0).

        Lines after `resume_step` are cut off: those steps are done again.

        Raises:
            CheckpointError: the file lacks steps up to `resume_step`, or its hashes do not follow from its keys.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step and not path.exists():
            raise CheckpointError(f"{path}: missing; {_WAY_OUT}")
        stream = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by close)
        try:
            digest = START_DIGEST
            for step in range(1, (resume_step or 0) + 1):
                try:
                    _, digest = read_line(stream.readline(), digest, step=step)
                except ValueError as error:
                    raise CheckpointError(f"{path}: {error}; {_WAY_OUT}") from None
            stream.truncate(stream.tell())
        except BaseException:
            stream.close()
            raise
        return Ledger(path, stream, digest=digest, step=resume_step or 0)

    def record(
        self,
        step: int,
        keys: Sequence[str],
        skipped: Mapping[str, str],
        *,
        quarantined: Mapping[str, str] | None = None,
    ) -> None:
        """Write the line of `step`.

        Args:
            keys: all keys of the global step, in order (`GlobalStep.keys`).
            skipped: key -> reason, of all ranks.
            quarantined: shard -> reason, of the shards that were given up in this step (`GlobalStep.quarantined`).
        """
        if step != self.step + 1:
            raise ValueError(f"{self.path}: step {step} after step {self.step}; every step is recorded once")
        used = [key for key in keys if key not in skipped]
        self.digest = _advance(self.digest, step, used, skipped)
        line = {"step": step, "keys": used, "skipped": dict(sorted(skipped.items())), "digest": self.digest}
        if quarantined:
            line["quarantined"] = dict(sorted(quarantined.items()))
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
        self.step = step

    def sync(self) -> None:
        """Make the lines survive a power cut; to be called before a checkpoint that relies on them is complete."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        if not self._stream.closed:
            self.sync()
            self._stream.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _advance(digest: str, step: int, used: Sequence[str], skipped: Mapping[str, str]) -> str:
    # Only the keys of skips: reasons hold paths and library messages, which differ between machines. Shards in
    # quarantine show in the keys that are skipped.
    content = json.dumps([digest, step, list(used), sorted(skipped)], ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def read_line(line: bytes, digest: str, *, step: int) -> tuple[dict[str, Any], str]:
    """The values of a stored line, which must be that of `step`, and the digest after it.

    Args:
        digest: before it.

    Raises:
        ValueError: it is another step's, torn, or edited.
    """
    try:
        if not line.endswith(b"\n"):
            raise ValueError("the file ends here")
        values: dict[str, Any] = json.loads(line)
        found = (values["step"], values["digest"])
        expected = (step, _advance(digest, step, values["keys"], values["skipped"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the line of step {step} is missing or torn ({error!r})") from None
    if found != expected:
        raise ValueError(f"step {step}: step and hash {found}, expected {expected}")
    return values, expected[1]
