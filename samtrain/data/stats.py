"""What a set holds, in numbers: images per sample, their sizes, lengths of the texts, for each split and task.

Read from the records alone (lint is what compares them with the images), so it takes seconds for tens of thousands of
samples. Texts are counted in tokens where a tokenizer is given, else in words; `<image>` placeholders are not counted,
because what an image costs depends on the model.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from samtrain.core.errors import DataError
from samtrain.core.sample import IMAGE_PLACEHOLDER, SampleRecord
from samtrain.data.index import ShardIndex
from samtrain.data.splits import find_places
from samtrain.data.storage import Location, parse_location

ProgressCallback = Callable[[str, int, int], None]  # (what, done, total)
CountTokens = Callable[[Sequence[str]], list[int]]
_BATCH = 512
STATS_VERSION = 1
ALL = "all"  # the tasks of a split together


@dataclass
class GroupStats:
    """Lists with an item for each sample (images: for each image, as width and height in pixels)."""

    num_images: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    instruction: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    instruction_characters: list[int] = field(default_factory=list)
    output_characters: list[int] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return len(self.num_images)

    def to_dict(self, unit: str) -> dict[str, Any]:
        return {
            "samples": self.num_samples,
            "images": sum(self.num_images),
            "images_per_sample": summary(self.num_images) | {"counts": _counts(self.num_images)},
            "image_width": summary([width for width, _ in self.sizes]),
            "image_height": summary([height for _, height in self.sizes]),
            "image_megapixels": summary([width * height / 1e6 for width, height in self.sizes]),
            f"instruction_{unit}": summary(self.instruction),
            f"output_{unit}": summary(self.output),
            "instruction_characters": summary(self.instruction_characters),
            "output_characters": summary(self.output_characters),
        }


@dataclass
class SetStats:
    """splits: name -> task -> numbers; the task `ALL` is all of them. unreadable: key -> why it is not counted."""

    path: Location
    unit: str  # tokens | words
    tokenizer: str | None
    splits: dict[str, dict[str, GroupStats]] = field(default_factory=dict)
    unreadable: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": STATS_VERSION,
            "path": str(self.path),
            "unit": self.unit,
            "tokenizer": self.tokenizer,
            "splits": {
                split: {
                    ALL: tasks[ALL].to_dict(self.unit),
                    "tasks": {task: group.to_dict(self.unit) for task, group in tasks.items() if task != ALL},
                    "unreadable": self.unreadable[split],
                }
                for split, tasks in self.splits.items()
            },
        }


def summary(values: Sequence[float]) -> dict[str, float]:
    """min, percentiles, mean, max and total; empty for no values."""
    if not values:
        return {}
    array = np.asarray(values, dtype=np.float64)
    p5, p50, p95 = (float(value) for value in np.percentile(array, [5, 50, 95]))
    found = {"min": float(array.min()), "p5": p5, "median": p50, "mean": float(array.mean()), "p95": p95}
    found |= {"max": float(array.max()), "total": float(array.sum())}
    return {name: round(value, 4) for name, value in found.items()}


def set_stats(
    path: str | Location,
    *,
    tokenizer: str | None = None,
    progress: ProgressCallback = lambda what, done, total: None,
) -> SetStats:
    """Numbers of every split under `path`.

    Args:
        tokenizer: a folder or a name that transformers' AutoTokenizer knows.

    Raises:
        DataError: no shards, no index, or no such tokenizer.
    """
    splits = find_places(path)
    indexes = {name: ShardIndex.load(place, tolerate_broken_shards=True) for name, place in splits.items()}
    count = load_counter(tokenizer) if tokenizer else _count_words
    stats = SetStats(parse_location(path), "tokens" if tokenizer else "words", tokenizer)
    total, done = sum(map(len, indexes.values())), 0
    for name, index in indexes.items():
        tasks: dict[str, GroupStats] = {ALL: GroupStats()}
        stats.splits[name], stats.unreadable[name] = tasks, {}
        for batch in _batches(index, stats.unreadable[name]):
            lengths = zip(count([_text(r.instruction) for r in batch]), count([r.output for r in batch]))
            for record, (instruction, output) in zip(batch, lengths):
                for group in (tasks[ALL], tasks.setdefault(record.task, GroupStats())):
                    _add(group, record, instruction, output)
            done += len(batch)
            progress("reading records", done, total)
        progress("reading records", done := done + len(stats.unreadable[name]), total)
        index.close()
    return stats


def load_counter(tokenizer: str) -> CountTokens:
    """Texts -> tokens of each, without special ones.

    Raises:
        DataError: transformers finds no such tokenizer.
    """
    from transformers import AutoTokenizer

    if tokenizer.startswith((".", "/", "~")) and not Path(tokenizer).expanduser().is_dir():
        raise DataError(f"--tokenizer {tokenizer}: no such folder")
    try:
        loaded = AutoTokenizer.from_pretrained(os.path.expanduser(tokenizer))
    except Exception as error:  # transformers raises many kinds: OSError, ValueError, KeyError, of the hub's too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"--tokenizer {tokenizer}: cannot be loaded: {reason}") from None

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in loaded(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    return count


def _count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _text(instruction: str) -> str:
    return instruction.replace(IMAGE_PLACEHOLDER, " ")


def _batches(index: ShardIndex, unreadable: dict[str, str]) -> Iterator[list[SampleRecord]]:
    for start in range(0, len(index), _BATCH):
        chosen = range(start, min(start + _BATCH, len(index)))
        batch = []
        for i, record in zip(chosen, index.read_records(chosen)):
            if isinstance(record, DataError):
                unreadable[index.entries[i].key] = str(record)
            else:
                batch.append(record)
        yield batch


def _add(group: GroupStats, record: SampleRecord, instruction: int, output: int) -> None:
    group.num_images.append(len(record.images))
    group.sizes += [(image.width, image.height) for image in record.images]
    group.instruction.append(instruction)
    group.output.append(output)
    group.instruction_characters.append(len(record.instruction))
    group.output_characters.append(len(record.output))


def _counts(values: Sequence[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
