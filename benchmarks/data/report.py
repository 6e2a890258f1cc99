"""The run's text, from what its JSON holds."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data.machine import headline
from benchmarks.grid import grid

Content = dict[str, Any]
Row = dict[str, Any]


def write(path: Path, content: Content) -> None:
    """`path` as JSON and beside it the same as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".txt").write_text(text(content) + "\n")


def text(content: Content) -> str:
    parts = ["\n".join([*headline(content["header"]), *content["notes"]])]
    tables = (
        ("loading", loading),
        ("memory", memory),
        ("resume", resume),
        ("large_index", large_index),
        ("packing", packing),
    )
    parts += [table(content[name]) for name, table in tables if content.get(name)]
    return "\n\n".join(parts)


def best_peer(rows: Sequence[Row]) -> float | None:
    """Images a second of the fastest correct row of another loader."""
    rates = [row["images_per_second"]["median"] for row in rows if row["family"] == "peer" and row["match"] == "ok"]
    return max(rates, default=None)


def loading(rows: Sequence[Row]) -> str:
    best = best_peer(rows)

    def versus(row: Row) -> str:
        return f"{row['images_per_second']['median'] / best:.2f}" if best and row["match"] == "ok" else ""

    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("loader", lambda r: r["label"]),
        ("match", lambda r: r["match"]),
        ("images/s (min-max)", lambda r: _spread(r, "images_per_second", ".0f")),
        ("vs best peer", versus),
        ("CPU ms/image", lambda r: _median(r, "cpu_ms_per_image", ".2f")),
        ("first batch s", lambda r: _median(r, "first_seconds", ".2f")),
        ("imports s", lambda r: _median(r, "import_seconds", ".1f")),
        ("pixels differ by", lambda r: f"{r['difference']:.2f}" if r.get("difference") is not None else ""),
        ("", lambda r: r["why"]),
    ]
    names = [row["label"].split(", ")[0] if row["family"] == "peer" else row["label"] for row in rows]
    settings = dict.fromkeys((name, row["settings"]) for name, row in zip(names, rows))
    notes = [f"  {label}: {setting}" for label, setting in settings if setting]
    return "\n".join(
        [
            "LOADING: images a second, decoded and cut, delivered to the training process",
            _table(columns, rows),
            "first batch: from opening the set, after imports. CPU: all processes of the row. pixels differ by: mean,",
            "of 255, from PIL's full decode and bicubic; OpenCV's INTER_LINEAR is faster and fails (skips pixels).",
            "webdataset, our decoding: no peer, but what of ours is decoding, and what the loader.",
            *notes,
        ]
    )


def memory(rows: Sequence[Row]) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("loader", lambda r: r["label"]),
        ("peak MB", lambda r: f"{r['peak_bytes'] / 1e6:.0f}" if r.get("peak_bytes") else ""),
        ("grows by KB/1000 images", lambda r: f"{r['bytes_per_image']:.0f}" if "bytes_per_image" in r else ""),
        ("images", lambda r: str(r.get("images", ""))),
        ("", lambda r: r.get("error", "")),
    ]
    return "\n".join(
        ["MEMORY: proportional set size of all processes; slope of a line after the first tenth", _table(columns, rows)]
    )


def resume(rows: Sequence[Row]) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("loader", lambda r: r["label"]),
        ("first batch at start s", lambda r: _number(r, "first_seconds_at_start")),
        ("in the middle s", lambda r: _number(r, "first_seconds_resumed")),
        ("how", lambda r: "" if r.get("error") else "its state" if r["has_state"] else "reads on, undecoded"),
        ("each key once", lambda r: r.get("error") or r["wrong"] or "yes"),
    ]
    return "\n".join(["RESUMING in a new process after half an epoch", _table(columns, rows)])


def large_index(found: Content) -> str:
    places = ", ".join(f"{r['first_seconds']:.2f} s after {r['position']}" for r in found["places"])
    return (
        f"LARGE SET: ours, {found['num_samples']} samples, from opening the index to the first batch: {places} samples"
    )


def packing(rows: Sequence[Row]) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("set", lambda r: r["set"]),
        ("ranks", lambda r: str(r["ranks"])),
        ("method", lambda r: r["method"]),
        ("tokens/processed", lambda r: f"{r['tokens_of_processed']:.3f}"),
        ("labels/processed", lambda r: f"{r['labels_of_processed']:.3f}"),
        ("tokens/budget", lambda r: f"{r['tokens_of_budget']:.3f}"),
        ("labels/budget", lambda r: f"{r['labels_of_budget']:.3f}"),
        ("max/mean of a round", lambda r: f"{r['imbalance']:.3f}"),
        ("waiting", lambda r: f"{100 * r['waiting_share']:.1f} %"),
        ("micro-batches", lambda r: f"{r['micro_batches']:.2f}"),
    ]
    return "\n".join(
        [
            "PACKING: counted, not timed (benchmarks/data/packing.py); costs weighed as the loader does",
            _table(columns, rows),
            "processed: token places that are computed, padding included. budget: of data.max_tokens in every",
            "micro-batch, fillers included. max/mean: costliest rank of a round over the mean; waiting: time lost.",
        ]
    )


def _table(columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]) -> str:
    lines = [[name for name, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
    return grid(lines, left=[0, -1])


def _median(row: Row, key: str, form: str) -> str:
    return format(row[key]["median"], form) if key in row else ""


def _number(row: Row, key: str) -> str:
    return f"{row[key]:.2f}" if key in row else ""


def _spread(row: Row, key: str, form: str) -> str:
    if key not in row:
        return ""
    return f"{row[key]['median']:{form}} ({row[key]['min']:{form}}-{row[key]['max']:{form}})"
