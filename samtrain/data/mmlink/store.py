"""Results of stages on disk, by key: what is there is not done again.

    WORK/STAGE/SEGMENT.zip      the results of one batch; members KEY/NAME, and times.json: what each took

A segment is written beside, flushed and renamed, so after kill -9 it is whole or absent; what it costs is the batches
that were under way. Segments are plain zip files: any tool shows what a stage made, and every read checks the CRC.
Workers on several nodes write into one folder; nothing is ever changed in place.
"""

import io
import json
import time
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.files import atomic_write
from samtrain.core.log import logger

META = "meta.json"
_TIMES = "times.json"
_SUFFIX = ".zip"
_MAX_OPEN = 128
_LEFTOVER_SECONDS = 600

Blobs = dict[str, bytes]
Ref = str  # "STAGE/SEGMENT.zip:KEY"
Times = dict[str, tuple[float, float]]  # key -> seconds by the clock, seconds on a core


class Store:
    """The results below a work folder. Cheap to make in every process; not for several threads."""

    def __init__(self, work: Path) -> None:
        self.work = Path(work)
        self._open: OrderedDict[str, zipfile.ZipFile] = OrderedDict()

    def scan(self, stage: str) -> dict[str, Ref]:
        """Key -> ref of every result of a stage. A damaged segment is set aside, named and done again."""
        found: dict[str, Ref] = {}
        folder = self.work / stage
        for path in sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []:
            try:
                with zipfile.ZipFile(path) as archive:
                    names = archive.namelist()
            except (zipfile.BadZipFile, OSError) as error:
                aside = path.with_name(path.name + ".damaged")
                path.rename(aside)
                logger.warning("%s: damaged (%s); set aside as %s, its work is done again", path, error, aside.name)
                continue
            for name in names:
                key, _, member = name.partition("/")
                if member:
                    found.setdefault(key, f"{stage}/{path.name}:{key}")
        return found

    def write(self, stage: str, results: Sequence[tuple[str, Blobs]], times: Times | None = None) -> list[Ref]:
        """Write the results of a batch, and what they took, as one segment; returns their refs, in order."""
        if not results:
            return []
        name = f"{uuid.uuid4().hex[:16]}{_SUFFIX}"
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for key, blobs in results:
                for blob_name, data in blobs.items():
                    archive.writestr(zipfile.ZipInfo(f"{key}/{blob_name}"), data)
            archive.writestr(zipfile.ZipInfo(_TIMES), json.dumps(times or {}))
        atomic_write(self.work / stage / name, stream.getvalue())
        return [f"{stage}/{name}:{key}" for key, _ in results]

    def read(self, ref: Ref, name: str) -> bytes:
        """One blob of a result.

        Raises:
            DataError: it is not there or damaged.
        """
        segment, _, key = ref.partition(":")
        try:
            return self._archive(segment).read(f"{key}/{name}")
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.work / segment}: cannot read {key}/{name} ({error}); delete this file and build again: what it "
                "held is made anew. On a cluster, the work folder must be on a disk that every node sees"
            ) from None

    def meta(self, ref: Ref) -> dict[str, Any]:
        """The facts of a result; {"rejected": why} where the item cannot be used."""
        values: dict[str, Any] = json.loads(self.read(ref, META))
        return values

    def took(self, refs: Iterable[Ref]) -> tuple[float, float]:
        """Seconds by the clock and on a core that results took, whichever build made them."""
        keys: dict[str, list[str]] = {}
        for ref in refs:
            segment, _, key = ref.partition(":")
            keys.setdefault(segment, []).append(key)
        total = [0.0, 0.0]
        for segment, members in keys.items():
            try:
                times: Times = json.loads(self._archive(segment).read(_TIMES))
            except (KeyError, ValueError, OSError, zipfile.BadZipFile):
                continue  # times are for the report alone
            for key in members:
                for i, seconds in enumerate(times.get(key, (0.0, 0.0))):
                    total[i] += seconds
        return total[0], total[1]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _archive(self, segment: str) -> zipfile.ZipFile:
        archive = self._open.get(segment)
        if archive is None:
            path = (self.work / segment).resolve()
            if self.work.resolve() not in path.parents:
                raise DataError(f"{segment!r} is no segment of {self.work}")
            archive = self._open[segment] = zipfile.ZipFile(path)
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(segment)
        return archive


def remove_leftovers(work: Path) -> None:
    """Temporary files that a killed writer left: those nobody wrote to for a while."""
    for path in Path(work).glob("*/.*.tmp"):
        if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)
