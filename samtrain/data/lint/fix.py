"""A clean set from what lint found to be good: new shards, a new index, and a list of all that was left out.

Images and extra members are copied byte for byte; records are written anew, with the true sizes and hashes. The set is
written beside and takes its name when it is whole, so that a full disk leaves nothing behind.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.files import atomic_write, fsync_directory
from samtrain.core.sample import SampleRecord
from samtrain.data.index import Extent
from samtrain.data.lint.check import CheckedSample
from samtrain.data.lint.findings import KINDS
from samtrain.data.lint.lint import LintReport, ProgressCallback, SplitReport
from samtrain.data.shards import ShardWriter

LEFT_OUT_FILE = "left_out.jsonl"
# Terms and authors of the pictures travel with them.
_COPIED = ("ATTRIBUTION*", "attribution*", "LICENSE*", "LICENCE*", "COPYING*")


def check_output(report_path: Path, output: Path) -> None:
    """Refuse an output folder that would be overwritten, or that lies in the set itself.

    Raises:
        DataError: naming it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"--fix {output}: is there already and not empty; choose another folder, or delete it")
    if report_path.resolve() in (output.resolve(), *output.resolve().parents):
        raise DataError(f"--fix {output}: lies in {report_path} itself; choose a folder beside it")


def write_clean(
    report: LintReport, output: str | Path, *, progress: ProgressCallback = lambda what, done, total: None
) -> dict[str, Any]:
    """Write the good samples of `report` to `output`, a folder like the one that was looked at.

    Returns:
        {"path", "samples", "left_out", "mended", "lost", "splits": {name: samples}}. lost: samples the index lists
        and the shards do not hold any more.

    Raises:
        DataError: the output is taken, no sample is good, the disk is full, or shards have changed since.
    """
    output = Path(output)
    check_output(report.path, output)
    good = {split.name: [sample for sample in split.samples if report.is_good(sample)] for split in report.splits}
    for name, samples in good.items():
        if not samples:
            raise DataError(f"{report.path}: {name} has no good sample; a clean set would lack this split")
    _check_disk(good, output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    total, done = sum(map(len, good.values())), 0
    left_out: list[dict[str, Any]] = list(_bad_rows(report))
    try:
        temporary.mkdir(parents=True)
        for split in report.splits:
            folder = temporary / split.name if report.is_set else temporary
            with ShardWriter(folder) as writer:
                for sample in good[split.name]:
                    _copy(split, sample, writer)
                    done += 1
                    progress("writing the clean set", done, total)
        _copy_terms(report.path, temporary)
        lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in left_out)
        atomic_write(temporary / LEFT_OUT_FILE, lines.encode(errors="backslashreplace"))
        if output.exists():
            output.rmdir()  # empty
        temporary.rename(output)
        fsync_directory(output.parent)
    except OSError as error:
        raise DataError(f"--fix {output}: {error}; nothing was left there") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "path": str(output),
        "samples": total,
        "left_out": sum(row["action"] == "left out" and bool(row["key"]) for row in left_out),
        "mended": sum(row["action"] == "mended" for row in left_out),
        "lost": sum(row["action"] == "lost" for row in left_out),
        "splits": {name: len(samples) for name, samples in good.items()},
    }


def _check_disk(good: dict[str, list[CheckedSample]], output: Path) -> None:
    needed = sum(sample.stop - sample.start for samples in good.values() for sample in samples)
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DataError(
            f"--fix {output}: the clean set takes {needed / 2**20:.1f} MiB, {existing} has {free / 2**20:.1f} MiB free"
        )


def _bad_rows(report: LintReport) -> Iterator[dict[str, Any]]:
    """One row for each sample with a problem or lost, and for what concerns no sample: members and whole shards."""
    for split in report.splits:
        for name, keys in split.lost.items():
            kind = "index-disagrees" if name in split.shards else "missing-shard"
            for key in keys:
                yield _row("lost", split, name, key, [(kind, "the index lists it, the shard does not hold it")])
        for name, shard in split.shards.items():
            for kind, reason in shard.problems:
                yield _row("left out", split, name, "", [(kind, reason)])
        for sample in split.samples:
            if sample.problems:
                mends = any(not KINDS[kind].drops for kind, _ in sample.problems)
                action = "left out" if not report.is_good(sample) else "mended" if mends else "kept"
                yield _row(action, split, sample.shard, sample.key, sample.problems)


def _row(action: str, split: SplitReport, shard: str, key: str, problems: list[tuple[str, str]]) -> dict[str, Any]:
    reasons = [{"kind": kind, "reason": reason} for kind, reason in problems]
    return {"action": action, "split": split.name, "shard": shard, "key": key, "problems": reasons}


def _copy(split: SplitReport, sample: CheckedSample, writer: ShardWriter) -> None:
    path = split.folder / sample.shard
    with open(path, "rb") as stream:

        def read(extent: Extent) -> bytes:
            data = os.pread(stream.fileno(), extent[1], extent[0])
            if len(data) != extent[1]:
                raise DataError(f"{path}: {sample.key}: the shard was changed while it was looked at; begin again")
            return data

        record = SampleRecord.from_json(read(sample.record), where=f"{path}: {sample.key}")
        writer.write(
            key=sample.key,
            task=record.task,
            instruction=record.instruction,
            output=record.output,
            images=[read(extent) for extent in sample.images],
            source=record.source,
            meta=record.meta,
            extra={name: read(extent) for name, extent in sample.extras.items()},
        )


def _copy_terms(source: Path, target: Path) -> None:
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_file() and not path.is_symlink():
                shutil.copyfile(path, target / path.name)
