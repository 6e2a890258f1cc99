"""Build mmlink-mini: fetch, render, compose, write; whole or not at all.

    folder/build_report.json          what was built, from what, and what was not (written last, before the rename)
    folder/ATTRIBUTION.md, attribution.json
    folder/train, validation, test_style, test_combination, test_identity     shards and their index
    folder/train_story, validation_story, test_story                          the same, where stories can be built

Everything goes to a folder beside and is renamed at the end. The bytes depend on the options and on the versions of the
renderer and the image library, never on the number of processes. Stories depend on the installed game too; the other
splits do not depend on stories.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.files import atomic_write, atomic_write_json
from samtrain.data import parallel
from samtrain.data.index import ShardIndex
from samtrain.data.mini import sources
from samtrain.data.mini.art import Progress, render_stock
from samtrain.data.mini.catalog import HELD_OUT_STYLES, TRAIN_STYLES
from samtrain.data.mini.plans import SPLITS
from samtrain.data.mini.samples import SampleMaker
from samtrain.data.mini.stories import StoryMaker, StoryPart, find_stories, note_on_reuse, prepare_stories
from samtrain.data.options import MiniOptions
from samtrain.data.shards import ShardWriter

REPORT_FILE = "build_report.json"
FORMAT_VERSION = 1  # raised when the same options give other samples
_STORY_STOCK = ".stories.zip"  # while the set is built
_STORY_LICENCE_FILE = "COPYING.wesnoth.txt"
_STORY_OPTIONS = {"stories", "story_sources"}  # what they lead to is in the report, and no part of other splits


def build_mini(
    folder: Path, options: MiniOptions, *, cache: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Build the set in `folder`, or find it there, complete and built with the same options.

    Args:
        cache: where tarballs and rendered drawings are kept (in its sub-folder `mini`); default: the environment
            variable SAMTRAIN_CACHE, else ~/.cache/samtrain. With a filled cache no network is needed.
        progress: called as progress(what, done, total), about a hundred times per step.

    Returns:
        The build report, with `reused` telling whether the set was there already.

    Raises:
        DataError: the folder holds something else, sources cannot be had or are not the pinned ones.
    """
    folder = Path(folder).absolute()
    wanted = {"format_version": FORMAT_VERSION, **options.model_dump(exclude=_STORY_OPTIONS)}
    found = _existing(folder, wanted)
    if found is not None:
        note_on_reuse(found, options, folder=folder)
        return found | {"reused": True}
    story_source = find_stories(options)
    store = (cache or _default_cache()) / "mini"
    report_progress = _thinned(progress)
    num_workers = parallel.available_cores()
    started = time.monotonic()
    stock = render_stock(store, num_workers=num_workers, progress=report_progress)
    credits = sources.attribution(store)
    rendered = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
    try:
        building.chmod(0o755)  # mkdtemp makes private folders; a data set is not private
        maker = SampleMaker(stock, max_identities=options.max_identities, seed=options.seed)
        stories = prepare_stories(story_source, building / _STORY_STOCK, options, progress=report_progress)
        read = time.monotonic()
        splits = _write_splits(building, stock, stories, options, num_workers=num_workers, progress=report_progress)
        (building / _STORY_STOCK).unlink(missing_ok=True)
        _write_attribution(building, credits, stories)
        seconds = {
            "sources": round(rendered - started, 1),
            "stories": round(read - rendered, 1),
            "samples": round(time.monotonic() - read, 1),
        }
        report = _report(wanted, maker, splits, stories) | {"seconds": seconds}
        atomic_write_json(building / REPORT_FILE, report)
        try:
            os.rename(building, folder)  # also onto an empty folder
        except OSError:
            found = _existing(folder, wanted)  # somebody else was faster
            if found is None:
                raise
            note_on_reuse(found, options, folder=folder)
            return found | {"reused": True}
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return report | {"reused": False}


def _existing(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the complete build in `folder` if its options are the wanted ones; None if nothing is there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_bytes())
        built = report["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder}: is not empty and holds no complete mmlink-mini (no readable {REPORT_FILE}); "
            "choose another folder, or delete this one"
        ) from None
    different = [
        f"{name} is {built.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted({*built, *wanted})
        if built.get(name) != wanted.get(name)
    ]
    if different:
        raise DataError(
            f"{folder}: holds an mmlink-mini built with other options: {'; '.join(different)}; "
            "choose another folder, or delete this one"
        )
    return report


def _default_cache() -> Path:
    chosen = os.environ.get("SAMTRAIN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "samtrain"


_makers: dict[str, SampleMaker | StoryMaker] = {}  # of a worker process, by split


def _start_worker(stock: Path, story_stock: Path | None, max_identities: int | None, seed: int) -> None:
    maker = SampleMaker(stock, max_identities=max_identities, seed=seed)
    _makers.update(dict.fromkeys(SPLITS, maker))
    if story_stock is not None:
        story_maker = StoryMaker(story_stock, seed=seed)
        _makers.update(dict.fromkeys(story_maker.windows, story_maker))


def _make(job: tuple[str, int]) -> dict[str, Any]:
    split, index = job
    return _makers[split](split, index)


def _write_splits(
    building: Path, stock: Path, stories: StoryPart, options: MiniOptions, *, num_workers: int, progress: Progress
) -> dict[str, Any]:
    """Compose all samples and write each split's shards; returns the report's row of every split."""
    counts = {split: options.num_train if split == "train" else options.num_eval for split in SPLITS} | stories.counts
    jobs = [(split, index) for split in counts for index in range(counts[split])]
    samples = parallel.ordered_map(
        _make,
        jobs,
        num_workers=num_workers,
        initializer=_start_worker,
        initargs=(stock, stories.stock, options.max_identities, options.seed),
    )
    rows, done = {}, 0
    for split in counts:
        answers: dict[str, Counter[str]] = {}
        num_images = 0
        with ShardWriter(building / split) as writer:
            for sample in _take(samples, counts[split]):
                writer.write(**sample)
                answers.setdefault(sample["task"], Counter())[sample["output"]] += 1
                num_images += len(sample["images"])
                done += 1
                progress("composing samples", done, len(jobs))
        rows[split] = {
            "samples": counts[split],
            "images": num_images,
            "bytes": sum(path.stat().st_size for path in (building / split).iterdir()),
            "digest": ShardIndex.load(building / split).digest,
            "tasks": {task: _task_row(counter) for task, counter in sorted(answers.items())},
        }
    return rows


def _take(samples: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        yield next(samples)


def _task_row(answers: Counter[str]) -> dict[str, Any]:
    """How many samples a task has, and how far the majority answer would get."""
    answer, count = answers.most_common(1)[0]
    total = sum(answers.values())
    return {
        "samples": total,
        "distinct_answers": len(answers),
        "majority_answer": answer,
        "majority_share": round(count / total, 4),
    }


def _report(wanted: dict[str, Any], maker: SampleMaker, splits: dict[str, Any], stories: StoryPart) -> dict[str, Any]:
    roles = Counter(identity.role for identity in maker.identities)
    return {
        "name": "mmlink-mini",
        "options": wanted,
        "splits": splits,
        "identities": {"total": len(maker.identities), **dict(sorted(roles.items()))},
        "kinds": dict(Counter(identity.kind.name or "(no kind)" for identity in maker.identities)),
        "styles": {"train": list(TRAIN_STYLES), "test_style": list(HELD_OUT_STYLES)},
        "parts": {
            "group captioning": {"built": True},
            "cued linking": {"built": True},
            "stories": stories.report,
        },
        "backgrounds": "composited from generated colours and shapes; no inpainting; stories on painted landscapes",
        "sources": [f"{package.name}@{package.version}" for package in _packages()],
        "versions": {name: importlib.metadata.version(name) for name in ("resvg-py", "pillow", "numpy")},
    }


def _packages() -> list[sources.Package]:
    return [*sources.STYLE_PACKAGES.values(), sources.EMOJIBASE]


def _write_attribution(folder: Path, credits: list[dict[str, Any]], stories: StoryPart) -> None:
    atomic_write_json(folder / "attribution.json", [*credits, *stories.credits])
    if stories.licence_text:
        atomic_write(folder / _STORY_LICENCE_FILE, stories.licence_text)
    lines = [
        "# Attribution",
        "",
        "The pictures are composed from the works below, each under its own licence; all were changed: "
        f"{credits[0]['changes']}.",
        "",
    ]
    if stories.credits:
        row = stories.credits[0]
        text = f" (text: {_STORY_LICENCE_FILE})" if stories.licence_text else ""
        lines += [
            f"Pictures and text of {', '.join(stories.counts)} are from Battle for Wesnoth and its campaigns, and may "
            f"be passed on under {row['licence']}{text}; changed: {row['changes']}.",
            "",
        ]
    lines += ["| title | author | licence | package | style |", "|---|---|---|---|---|"]
    for row in [*credits, *stories.credits]:
        author = f"[{row['author']}]({row['homepage']})" if row["homepage"] else row["author"]
        licence = f"[{row['licence']}]({row['licence_url']})" if row["licence_url"] else row["licence"]
        cells = (row["title"], author, licence, f"{row['package']} {row['version']}", row["style"])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    atomic_write(folder / "ATTRIBUTION.md", "\n".join(lines) + "\n")


def _thinned(progress: Progress | None) -> Progress:
    """Call `progress` about a hundred times per step, and at its end."""

    def report(what: str, done: int, total: int) -> None:
        if progress is not None and (done == total or done % max(1, total // 100) == 0):
            progress(what, done, total)

    return report
