"""Foreign records to shards, and shards to foreign records.

The output folder appears when everything is in it, by one rename, or not at all; the report beside it is always
written. Images are copied byte for byte. The same input and options give the same bytes.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER
from samtrain.data.convert.base import Draft, Format, Record, Source
from samtrain.data.convert.export import export_split, split_folders
from samtrain.data.convert.formats import SHARDS, check_options, format_of, sources_of
from samtrain.data.convert.images import ImageFolder
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.report import Report
from samtrain.data.shards import ShardWriter

Progress = Callable[[str, int, int], None]
REPORT_SUFFIX = ".convert.json"
MAX_META_BYTES = 1_000_000  # of what a record holds besides its texts


def convert(options: ConvertOptions, *, progress: Progress = lambda what, done, total: None) -> Report:
    """Convert `options.source` to `options.output`.

    Args:
        progress: called as progress(what, hundredths done, 100), for each split.

    Returns:
        The report, as it was written beside the output (`<output>.convert.json`, unless the options name a place).

    Raises:
        ConfigError, DataError: the input is not of that format, or too much of it is broken; nothing was written but
            the report.
    """
    check_options(options)
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: is not empty; choose another folder or delete it")
    path = (
        Path(options.report) if options.report else output.absolute().with_name(output.absolute().name + REPORT_SUFFIX)
    )
    jobs = _export_jobs(options) if options.format == SHARDS else _import_jobs(options)
    facts = {
        "format": options.format,
        "to": options.to,
        "options": options.model_dump(exclude={"format", "to", "source", "output", "report"}),
    }
    with (
        Report(path, facts, max_bad_fraction=options.max_bad_fraction, strict=options.strict) as report,
        _building(output) as building,
    ):
        for name, write in jobs:
            write(building, report, _thinned(progress, name))
        report.finish()
    return report


Tick = Callable[[int, int], None]
Job = tuple[str, Callable[[Path, Report, Tick], None]]  # a split's name, and what writes it


def _import_jobs(options: ConvertOptions) -> list[Job]:
    chosen = format_of(options)
    jobs: list[Job] = []
    for source in sources_of(chosen, options):
        images = ImageFolder(source.images, max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
        jobs.append((source.split, partial(_import, chosen, source, images, options)))
    return jobs


def _export_jobs(options: ConvertOptions) -> list[Job]:
    folders = split_folders(Path(options.source))
    return [(split or folder.name, partial(_export, split, folder, options)) for split, folder in folders.items()]


def _import(
    chosen: Format,
    source: Source,
    images: ImageFolder,
    options: ConvertOptions,
    building: Path,
    report: Report,
    tick: Tick,
) -> None:
    _Import(chosen, source, images, options, report).write(building / source.split, tick)


def _export(split: str, shards: Path, options: ConvertOptions, building: Path, report: Report, tick: Tick) -> None:
    export_split(shards, building / split, options, report, split or shards.absolute().name, tick)


class _Import:
    """One source into one folder of shards."""

    def __init__(
        self, chosen: Format, source: Source, images: ImageFolder, options: ConvertOptions, report: Report
    ) -> None:
        self.chosen = chosen
        self.source = source
        self.images = images
        self.options = options
        self.report = report
        self.count = report.count(source.split)
        self.name = f"{options.format}:{source.path.absolute().name}"

    def write(self, folder: Path, tick: Callable[[int, int], None]) -> None:
        """All records, until the limit.

        Raises:
            DataError: too many are broken, or all.
        """
        options = self.options
        with ShardWriter(
            folder, max_samples_per_shard=options.max_samples_per_shard, max_shard_bytes=options.max_shard_bytes
        ) as writer:
            for record in self.chosen.records(self.source, options):
                self.count.records += 1
                try:
                    self._record(record, writer)
                    self.count.converted += 1
                except DataError as error:
                    reason = str(error).removeprefix(f"{folder}: ")
                    self.report.list(self.source.split, record.where, reason)
                tick(record.done, record.total)
                if options.limit is not None and self.count.samples >= options.limit:
                    break
            if not self.count.samples:
                first = f": {self.report.first[0]}" if self.report.first else ""
                raise DataError(f"{self.source.path}: none of its {self.count.records} records could be used{first}")

    def _record(self, record: Record, writer: ShardWriter) -> None:
        if record.problem is not None:
            raise DataError(record.problem)
        drafts = self.chosen.drafts(record, self.source, self.options, self.images)
        if not drafts:
            raise DataError("has no answer to be learnt")
        samples = self._samples(drafts, record)  # all of them first: a record is converted whole or listed
        for sample in samples:
            writer.write(**sample)
            self.count.samples += 1
            self.count.images += len(sample["images"])
        for name in drafts[0].row.keys() - self.chosen.fields:
            self.report.unknown_fields[name] += 1

    def _samples(self, drafts: list[Draft], record: Record) -> list[dict[str, Any]]:
        """The keyword arguments of `ShardWriter.write` for each draft."""
        for draft in drafts:
            self._check(draft)
        found: dict[str, bytes] = {}  # the parts of a dialogue share their images
        for number, one in enumerate(image for draft in drafts for image in draft.images):
            if isinstance(one, bytes):
                self.images.check(one, f"image {number}")
            elif one not in found:
                found[one] = self.images.read(one)
        return [
            self._sample(draft, [one if isinstance(one, bytes) else found[one] for one in draft.images], record)
            for draft in drafts
        ]

    def _sample(self, draft: Draft, images: list[bytes], record: Record) -> dict[str, Any]:
        sample = {"instruction": draft.instruction, "output": draft.output, "images": images}
        if draft.carried is not None:
            return sample | draft.carried | ({"task": self.options.task} if self.options.task else {})
        task = self.options.task or draft.task or self.source.task
        meta: dict[str, Any] = {"format": self.options.format, "row": draft.row}
        if any(isinstance(one, str) for one in draft.images):
            meta["images"] = [one if isinstance(one, str) else None for one in draft.images]
        if draft.part is not None:
            meta["part"] = draft.part
        part = "" if draft.part is None else f"-{draft.part}"
        key = f"{re.sub('[^A-Za-z0-9_-]+', '-', task).strip('-')[:40] or 'sample'}-{record.number:06d}{part}"
        return sample | {"key": key, "task": task, "source": self.name, "meta": meta}

    def _check(self, draft: Draft) -> None:
        """What no sample may be, whatever its format."""
        options = self.options
        if len(draft.images) > options.max_images:
            raise DataError(f"has {len(draft.images)} images, more than {options.max_images}")
        if IMAGE_PLACEHOLDER in draft.output:
            raise DataError(f"its answer holds {IMAGE_PLACEHOLDER}, which stands for an image")
        if not draft.output.strip():
            raise DataError("its answer is empty")
        if not draft.images and not draft.instruction.strip():
            raise DataError("it has neither images nor an instruction")
        try:
            names = [one for one in draft.images if isinstance(one, str)]
            rest = json.dumps([draft.row, draft.carried, names], allow_nan=False, ensure_ascii=False)
            sizes = [len(text.encode()) for text in (draft.instruction, draft.output)]
            rest_size = len(rest.encode())
        except UnicodeEncodeError as error:
            raise DataError(
                f"holds half of a surrogate pair, {error.object[error.start]!r}, which is no text"
            ) from None
        except ValueError:
            raise DataError("holds a number that is none (NaN or infinite)") from None
        if max(sizes) > options.max_text_bytes:
            raise DataError(f"has a text of {max(sizes)} bytes, more than {options.max_text_bytes}")
        if rest_size > MAX_META_BYTES:
            raise DataError(f"has {rest_size} bytes besides its texts, more than {MAX_META_BYTES}")


@contextmanager
def _building(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end, or vanishes."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{output.name}.building-", dir=output.parent))
    try:
        building.chmod(0o755)  # mkdtemp makes private folders; a data set is not private
        yield building
        try:
            os.rename(building, output)  # also onto an empty folder
        except OSError as error:
            raise DataError(f"{output}: cannot be put in place: {error.strerror}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _thinned(progress: Progress, what: str) -> Callable[[int, int], None]:
    """Call `progress` when another hundredth is done."""
    shown = -1

    def tick(done: int, total: int) -> None:
        nonlocal shown
        hundredth = 100 * done // max(total, 1)
        if hundredth != shown:
            shown = hundredth
            progress(f"{what}, %", hundredth, 100)

    return tick
