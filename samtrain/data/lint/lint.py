"""Lint a folder of shards, or a data set with one folder of shards for each split.

Three passes: the tars are walked (a process for each shard), the samples are checked (a process for each chunk of some
dozen), and what needs all of them at once is compared here: keys, equal samples, the index.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.data.index import INDEX_FILE, SampleEntry, ShardIndex
from samtrain.data.lint.check import CheckedSample, Chunk, Limits, check_chunk
from samtrain.data.lint.findings import KINDS, Finding
from samtrain.data.lint.walk import WalkedShard, walk_shard
from samtrain.data.parallel import ordered_map

ProgressCallback = Callable[[str, int, int], None]  # (what, done, total)
_CHUNK_SAMPLES = 32
REPORT_VERSION = 1


@dataclass
class SplitReport:
    """One folder of shards.

    shards: name -> walked, in order. samples: in the shards' order. lost: shard -> keys that the index lists and that
    are not there.
    """

    name: str
    folder: Path
    shards: dict[str, WalkedShard] = field(default_factory=dict)
    samples: list[CheckedSample] = field(default_factory=list)
    lost: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class LintReport:
    """Everything that was found. is_set: the path holds splits, not shards."""

    path: Path
    is_set: bool
    limits: Limits
    ignored: frozenset[str]
    splits: list[SplitReport]
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not any(finding.kind not in self.ignored for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> findings, in the order of `KINDS`."""
        counted = Counter(finding.kind for finding in self.findings)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def is_good(self, sample: CheckedSample) -> bool:
        """Fit for a clean set."""
        return not any(
            KINDS[kind].drops and not (kind in self.ignored and KINDS[kind].keepable) for kind, _ in sample.problems
        )

    def to_dict(self) -> dict[str, Any]:
        splits = {
            split.name: {
                "folder": str(split.folder),
                "shards": len(split.shards),
                "bytes": sum(shard.size for shard in split.shards.values()),
                "samples": len(split.samples),
                "good_samples": sum(self.is_good(sample) for sample in split.samples),
                "images": sum(len(sample.images) for sample in split.samples),
                "lost": split.lost,
            }
            for split in self.splits
        }
        return {
            "version": REPORT_VERSION,
            "path": str(self.path),
            "ok": self.is_clean,
            "seconds": round(self.seconds, 2),
            "limits": self.limits.model_dump(),
            "ignored": sorted(self.ignored),
            "splits": splits,
            "counts": self.counts,
            "kinds": {kind: {"what": KINDS[kind].what, "advice": KINDS[kind].advice} for kind in self.counts},
            "findings": [finding.to_dict() for finding in self.findings],
        }


def find_splits(path: str | Path) -> tuple[dict[str, Path], bool]:
    """Split -> its folder of shards, and whether `path` is a set of splits (else it is the one split itself).

    Raises:
        DataError: there are no shards.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give a folder of shards, or of splits that hold shards")
    if _holds_shards(path):
        return {path.absolute().name: path}, False
    splits = {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir() and _holds_shards(folder)}
    if not splits:
        raise DataError(f"{path}: neither it nor a folder in it holds *.tar; give a folder of shards, or of splits")
    return splits, True


def _holds_shards(folder: Path) -> bool:
    return (folder / INDEX_FILE).exists() or any(folder.glob("*.tar"))


def lint(
    path: str | Path,
    *,
    limits: Limits | None = None,
    ignore: frozenset[str] = frozenset(),
    num_workers: int = 1,
    progress: ProgressCallback = lambda what, done, total: None,
) -> LintReport:
    """Look at everything under `path`.

    Args:
        ignore: kinds that are found and listed, but are no reason to fail.

    Raises:
        DataError: there are no shards, or an unknown kind is to be ignored.
    """
    since = time.monotonic()
    unknown = sorted(ignore - KINDS.keys())
    if unknown:
        raise DataError(f"--ignore {unknown[0]}: no such kind of finding; there are {', '.join(KINDS)}")
    folders, is_set = find_splits(path)
    splits = [SplitReport(name, folder) for name, folder in folders.items()]
    report = LintReport(Path(path), is_set, limits or Limits(), ignore, splits)
    _walk_all(splits, num_workers, progress)
    _check_all(report, num_workers, progress)
    _mark_duplicates(splits)
    for split in splits:
        report.findings += _index_findings(split)
        report.findings += _shard_findings(split)
    report.seconds = time.monotonic() - since
    return report


def _walk_all(splits: list[SplitReport], num_workers: int, progress: ProgressCallback) -> None:
    paths = [(split, path) for split in splits for path in sorted(split.folder.glob("*.tar"))]
    walked = ordered_map(
        walk_shard, [path for _, path in paths], num_workers=num_workers, chunksize=1, worth_a_pool=_worth(len(paths))
    )
    for done, ((split, path), shard) in enumerate(zip(paths, walked), 1):
        split.shards[path.name] = shard
        progress("reading shards", done, len(paths))


def _check_all(report: LintReport, num_workers: int, progress: ProgressCallback) -> None:
    chunks = list(_chunks(report))
    total = sum(len(chunk.samples) for chunk in chunks)
    # A process costs half a second: for a few chunks this one is faster.
    checked = ordered_map(check_chunk, chunks, num_workers=num_workers, chunksize=1, worth_a_pool=_worth(len(chunks)))
    by_name = {split.name: split for split in report.splits}
    done = 0
    for samples in checked:
        if samples:
            by_name[samples[0].split].samples += samples
        done += len(samples)
        progress("checking samples", done, total)


def _worth(count: int) -> int:
    return 4 if count >= 4 else count + 1


def _chunks(report: LintReport) -> Iterator[Chunk]:
    for split in report.splits:
        for name, shard in split.shards.items():
            for start in range(0, len(shard.samples), _CHUNK_SAMPLES):
                samples = shard.samples[start : start + _CHUNK_SAMPLES]
                yield Chunk(split.name, split.folder / name, samples, report.limits)


def _mark_duplicates(splits: list[SplitReport]) -> None:
    """Note keys and contents met before; held-out splits come first, so that theirs is the one that stays."""
    keys: dict[str, CheckedSample] = {}
    contents: dict[bytes, CheckedSample] = {}
    for split in sorted(splits, key=lambda split: split.name.startswith("train")):
        for sample in split.samples:
            first = keys.setdefault(sample.key, sample)
            if first is not sample:
                sample.problems.append(("duplicate-key", f"this key is also in {_place(first)}"))
            if not sample.content:
                continue
            same = contents.setdefault(sample.content, sample)
            if same is not sample and same.key != sample.key:
                sample.problems.append(("duplicate-sample", f"equal to {same.key} in {_place(same)}"))


def _place(sample: CheckedSample) -> str:
    return f"{sample.split}/{sample.shard}"


def _shard_findings(split: SplitReport) -> Iterator[Finding]:
    for name, shard in split.shards.items():
        for kind, reason in shard.problems:
            yield Finding(kind, split.name, name, "", reason)
    for sample in split.samples:
        for kind, reason in sample.problems:
            yield Finding(kind, split.name, sample.shard, sample.key, reason)


def _index_findings(split: SplitReport) -> Iterator[Finding]:
    """What the index says against what is there."""
    if not (split.folder / INDEX_FILE).exists():
        yield Finding("index-missing", split.name, "", "", f"{split.folder / INDEX_FILE} is not there")
        return
    try:
        index = ShardIndex.load(split.folder, tolerate_broken_shards=True)
        header = json.loads((split.folder / INDEX_FILE).read_bytes())
    except (DataError, OSError, ValueError) as error:
        yield Finding("index-broken", split.name, "", "", str(error))
        return
    listed = {shard["url"]: shard for shard in header["shardlist"]}
    for name in sorted(split.shards.keys() - listed.keys()):
        yield Finding("index-disagrees", split.name, name, "", "the index does not list this shard")
    entries: dict[str, dict[str, SampleEntry]] = {name: {} for name in index.shards}
    for entry in index.entries:
        entries[index.shards[entry.shard]][entry.key] = entry
    samples: dict[str, dict[str, CheckedSample]] = {name: {} for name in split.shards}
    for sample in split.samples:
        samples[sample.shard][sample.key] = sample
    for name in index.shards:
        lost = [key for key in entries[name] if key not in samples.get(name, {})]
        if lost:
            split.lost[name] = lost
        if name not in split.shards:
            reason = f"the index lists it with {len(lost)} samples, the folder does not have it"
            yield Finding("missing-shard", split.name, name, "", reason)
            continue
        yield from _shard_against_index(split, name, listed[name])
        yield from _samples_against_index(split, name, entries[name], samples[name])


def _shard_against_index(split: SplitReport, name: str, listed: dict[str, Any]) -> Iterator[Finding]:
    shard = split.shards[name]
    if shard.size != listed["filesize"]:
        reason = f"{shard.size} bytes, the index says {listed['filesize']}"
        yield Finding("index-disagrees", split.name, name, "", reason)
    elif listed.get("sha256") and shard.sha256 != listed["sha256"]:
        reason = f"sha256 is {shard.sha256[:12]}..., the index says {listed['sha256'][:12]}...: its bytes have changed"
        yield Finding("index-disagrees", split.name, name, "", reason)


def _samples_against_index(
    split: SplitReport, name: str, entries: dict[str, SampleEntry], samples: dict[str, CheckedSample]
) -> Iterator[Finding]:
    """One finding for each way in which a shard's entries differ, with the first key."""
    lost = [key for key in entries if key not in samples]
    new = [key for key in samples if key not in entries]
    moved = [key for key in entries if key in samples and not _agrees(entries[key], samples[key])]
    for keys, what in (
        (lost, "samples of the index are not in the shard"),
        (new, "samples of the shard are not in the index"),
        (moved, "samples lie elsewhere, or have other images or texts, than the index says"),
    ):
        if keys:
            yield Finding("index-disagrees", split.name, name, keys[0], f"{len(keys)} {what}; the first is {keys[0]}")


def _agrees(entry: SampleEntry, sample: CheckedSample) -> bool:
    place = (entry.offset, entry.offset + entry.size) == (sample.start, sample.stop)
    if not place or entry.record != sample.record:
        return False
    # Of a record that cannot be read nothing more is known; that is a finding of its own.
    is_read = bool(sample.content)
    said = (entry.images, entry.text_bytes, entry.task)
    return not is_read or said == (sample.images, sample.text_bytes, sample.task)
