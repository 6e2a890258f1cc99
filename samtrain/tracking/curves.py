"""A figure of a run's curves from its `logging.jsonl`: losses, learning rate, gradient norm, throughput, CIDEr."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Scores by number of images and of the baseline: too many for a legend.
_LEFT_OUT = re.compile(r"eval/.*/(images_\d+|majority)/")
# Title of a panel -> what its metrics' names hold. A panel without points is not drawn.
_PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
    "throughput per second and GPU": ("_per_s",),
    "CIDEr": ("/cider",),
}


def curves_figure(rows: Sequence[dict[str, Any]], *, title: str = "") -> "Figure":
    """Draw the curves; works without a display and leaves pyplot's state alone.

    Args:
        rows: as `jsonl.read_rows` returns them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: _series(rows, parts) for name, parts in _PANELS.items()}
    panels = {name: series for name, series in panels.items() if series} or {"no metrics yet": {}}
    figure = Figure(figsize=(7, 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    for axes, (name, series) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
        _draw(axes, name, series)
    return figure


def _series(rows: Sequence[dict[str, Any]], parts: tuple[str, ...]) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> finite (step, value) points, of the metrics whose names hold one of `parts`."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            is_shown = any(part in key for part in parts) and not _LEFT_OUT.match(key)
            if is_shown and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(key, []).append((row["step"], value))
    return series


def _draw(axes: "Axes", name: str, series: dict[str, list[tuple[int, float]]]) -> None:
    values = [value for points in series.values() for _, value in points]
    # Rates of images, samples and tokens differ by orders of magnitude.
    if name.startswith("throughput") and values and min(values) > 0:
        axes.set_yscale("log")
    for key, points in sorted(series.items()):
        steps, numbers = zip(*points)
        axes.plot(steps, numbers, label=key, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize="x-small")
