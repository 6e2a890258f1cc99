"""Pictures of a run: memory and launches, and on a GPU time, against the number of images; and the roofline."""

from pathlib import Path
from typing import Any

from benchmarks.kernels.report import Table

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def draw(path: Path, header: dict[str, Any], tables: list[Table]) -> bool:
    """Write the figure; False where the tables hold nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    has_gpu = header["gpu"] is not None
    swept = sorted((t for t in tables if t["shape"].startswith("N") and t["level"] == "qformer"), key=_images)
    if not swept:
        return False
    kinds = [("saved", "kept for backward, MB", 1e6), ("launches", "launches, forward + backward", 1.0)]
    if has_gpu:
        kinds = [("both", "forward + backward, ms", 1.0), ("peak_bytes", "peak memory, MB", 1e6)]
    figure, axes = plt.subplots(1, len(kinds) + has_gpu, figsize=(5.2 * (len(kinds) + has_gpu), 4.2))
    for axis, (key, label, scale) in zip(axes, kinds):
        _against_images(axis, swept, key, label, scale)
    axes[0].legend(fontsize=8)
    if has_gpu:
        _roofline(axes[-1], header, tables)
    subject = "whole two-stream Q-Former, 16 samples, `others`, frozen, libraries with our structure"
    machine = header["gpu"] or "counted without a GPU: no GPU has run this"
    figure.suptitle(f"{subject}\n{machine}, commit {header['commit'][:12]}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _images(table: Table) -> int:
    return table["images"]


def _value(row: dict[str, Any], key: str) -> float | None:
    if row["match"] not in ("ok", "-"):
        return None
    if key == "launches":
        return row["launches_forward"] + row["launches_backward"] if "launches_forward" in row else None
    value = row.get(key)
    return value["median"] if isinstance(value, dict) else value


def _against_images(axis: Any, tables: list[Table], key: str, label: str, scale: float) -> None:
    names = list(dict.fromkeys((row["name"], row["label"]) for table in tables for row in table["rows"]))
    for marker, (name, row_label) in zip(MARKERS, names):
        points = [
            (table["images"], value / scale)
            for table in tables
            for row in table["rows"]
            if row["name"] == name and (value := _value(row, key)) is not None
        ]
        if points:
            axis.plot(*zip(*points), marker=marker, label=row_label)
    axis.set_xlabel("images per sample")
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _roofline(axis: Any, header: dict[str, Any], tables: list[Table]) -> None:
    """Effective rates (least operations over measured time) of forward passes under this run's own roof."""
    bandwidth, peak = header["copy_bytes_per_second"], header["matmul_flops_per_second"]
    intensities = [2.0**i for i in range(-2, 13)]
    axis.loglog(intensities, [min(peak, i * bandwidth) / 1e12 for i in intensities], color="black", label="roof")
    for marker, (level, name) in zip(MARKERS, [("op", "ours"), ("op", "sdpa"), ("cross", "ours"), ("cross", "sdpa")]):
        points = [
            (work["flops"] / work["bytes"], work["flops"] / (row["forward"]["median"] / 1e3) / 1e12)
            for table in tables
            if table["level"] == level and (work := table["floor"]["forward"])["flops"]
            for row in table["rows"]
            if row["name"] == name and row.get("forward")
        ]
        if points:
            axis.scatter(*zip(*points), marker=marker, label=f"{level}: {name}")
    axis.set_xlabel("least operations per byte")
    axis.set_ylabel("effective TFLOP/s, forward")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
