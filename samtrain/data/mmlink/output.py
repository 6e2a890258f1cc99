"""The finished set: facts for the writer, shards, attribution, what was not kept."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samtrain.core.files import atomic_write, atomic_write_json
from samtrain.data.index import ShardIndex
from samtrain.data.mmlink.filters import Finished
from samtrain.data.mmlink.language import Facts
from samtrain.data.mmlink.options import ICONS, OBJECTS
from samtrain.data.mmlink.plan import Plan, thing_row
from samtrain.data.mmlink.sources.listing import Listing, Progress
from samtrain.data.mmlink.store import Store
from samtrain.data.shards import ShardWriter

SOURCE = "mmlink"
TASKS = {OBJECTS: "mmlink_object", ICONS: "mmlink_icon", "covers": "mmlink_cover"}
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def facts_of(
    plan: Plan, objects: Sequence[Sequence[dict[str, Any]]], captions: dict[str, str], canvas: int
) -> dict[str, Any]:
    """What the writer is told of a sample. objects: rows of the composed canvases; canvas: its side in pixels."""
    places, neighbours, said = [], [], []
    for number, things in enumerate(plan.canvases):
        at = plan.targets[number]
        if objects:
            row = objects[number][at]
            places.append(f"row {row['row']}, column {row['column']}" if "row" in row else place_of(row["box"], canvas))
        if plan.domain == OBJECTS:
            neighbours.append([thing.name for i, thing in enumerate(things) if i != at])
            said.append(captions.get(things[at].picture, things[at].name))
    facts = Facts(
        domain=plan.domain,
        num_images=len(plan.canvases),
        name=plan.target.name,
        plural=plan.target.plural,
        captions=tuple(said),
        neighbours=tuple(tuple(names) for names in neighbours),
        places=tuple(places),
        titles=tuple(canvas[0].name.strip('"') for canvas in plan.canvases) if plan.common else (),
        common=plan.common,
        seed=plan.seed,
    )
    return json.loads(json.dumps(asdict(facts)))


def place_of(box: Sequence[int], canvas: int) -> str:
    """Where a box's middle is, in thirds: "at the top left", "on the right", "in the middle"."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row, column = _ROWS[min(2, int(3 * y / canvas))], _COLUMNS[min(2, int(3 * x / canvas))]
    if row:
        return f"at the {row} {column}".rstrip()
    return f"on the {column}" if column else "in the middle"


def write_splits(
    folder: Path,
    samples: Sequence[Finished],
    store: Store,
    rows: dict[str, dict[str, Any]],
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Shards and index of every split; returns the report's rows."""
    report = {}
    done = 0
    for split in sorted({sample.plan.split for sample in samples}):
        answers: dict[str, Counter[str]] = {}
        identities: set[str] = set()
        num_images = 0
        with ShardWriter(folder / split) as writer:
            for sample in (sample for sample in samples if sample.plan.split == split):
                record = _record(sample, store, rows[sample.plan.key])
                writer.write(**record)
                answers.setdefault(record["task"], Counter())[sample.answer] += 1
                identities |= {thing.identity for canvas in sample.plan.canvases for thing in canvas}
                num_images += len(record["images"])
                done += 1
                if done % 100 == 0 or done == len(samples):
                    progress("shards", done, len(samples))
        report[split] = {
            "samples": sum(counter.total() for counter in answers.values()),
            "images": num_images,
            "identities": len(identities),
            "bytes": sum(path.stat().st_size for path in (folder / split).iterdir()),
            "digest": ShardIndex.load(folder / split).digest,
            "tasks": {
                task: {"samples": counter.total(), "distinct_answers": len(counter)}
                for task, counter in sorted(answers.items())
            },
        }
    return report


def _record(sample: Finished, store: Store, row: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `ShardWriter.write`."""
    plan = sample.plan
    count = len(plan.canvases)
    pictures = []
    for number, things in enumerate(plan.canvases):
        objects = [
            thing_row(thing) | (row["objects"][number][i] if row["objects"] else {}) for i, thing in enumerate(things)
        ]
        pictures.append({"target": plan.targets[number], "objects": objects, **row["backgrounds"][number]})
    extra = {}
    if sample.compose_ref:
        extra = {f"{i}.mask.png": store.read(sample.compose_ref, f"{i}.mask.png") for i in range(count)}
    return {
        "key": plan.key,
        "task": TASKS[plan.domain],
        "instruction": sample.instruction,
        "output": sample.answer,
        "images": [store.read(sample.fill_ref, f"{i}.jpg") for i in range(count)],
        "source": SOURCE,
        "meta": {
            "split": plan.split,
            "domain": plan.domain,
            "identity": plan.target.identity,
            **({"common": plan.common} if plan.common else {}),
            "pictures": pictures,
        },
        "extra": extra,
    }


def write_rejected(folder: Path, rejected: Sequence[tuple[Plan, str]]) -> None:
    lines = [
        json.dumps({"key": plan.key, "identity": plan.target.identity, "reason": reason}, ensure_ascii=False)
        for plan, reason in sorted(rejected, key=lambda item: item[0].key)
    ]
    atomic_write(folder / "rejected.jsonl", "".join(f"{line}\n" for line in lines))


def write_attribution(folder: Path, listings: Sequence[Listing], used: set[str]) -> None:
    """Whom to thank: a row per work or package, and one per source picture that the set shows.

    used: ids of those pictures.
    """
    shown = [picture for listing in listings for picture in listing.pictures if picture.id in used]
    sources = {picture.source for picture in shown}
    credits = [row for listing in listings for row in listing.credits if row["style"] in sources or not row["style"]]
    atomic_write_json(folder / "attribution.json", credits)
    lines = [
        json.dumps(
            {
                "picture": picture.id,
                "identity": picture.identity,
                "name": picture.name,
                "source": picture.source,
                **{key: picture.facts[key] for key in ("licence", "credit") if key in picture.facts},
            },
            ensure_ascii=False,
        )
        for picture in shown
    ]
    atomic_write(folder / "pictures.jsonl", "".join(f"{line}\n" for line in lines))
    text = [
        "# Attribution",
        "",
        "The pictures are composed from the works below, each under its own licence; all were changed: segmented, "
        "scaled, rotated, mirrored, placed on other backgrounds. pictures.jsonl lists every source picture shown.",
        "",
        "| title | author | licence | package | used as |",
        "|---|---|---|---|---|",
    ]
    for row in credits:
        author = f"[{row['author']}]({row['homepage']})" if row["homepage"] else row["author"]
        licence = f"[{row['licence']}]({row['licence_url']})" if row["licence_url"] else row["licence"]
        cells = (row["title"], author, licence, f"{row['package']} {row['version']}".strip(), row["style"])
        text.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    atomic_write(folder / "ATTRIBUTION.md", "\n".join(text) + "\n")
