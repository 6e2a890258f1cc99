"""Numbers of a set for people: a table, and a figure."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from samtrain.data.stats import ALL, GroupStats, SetStats, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_TASKS = 12  # in the figure; the table and the JSON have all
_MAX_SIZES = 300  # bubbles


def stats_table(stats: SetStats) -> Table:
    """A row for each split, and for each of its tasks where it has several."""
    unit = stats.unit
    table = Table(title=Text(f"{stats.path}"), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("split, task", overflow="fold")
    for column in ("samples", "images", "per sample", "size, px", "instruction", "answer", unit):
        table.add_column(column, justify="right")
    for split, tasks in stats.splits.items():
        table.add_row(Text(split), *_cells(tasks[ALL]), style="bold", end_section=len(tasks) <= 2)
        named = [task for task in sorted(tasks) if task != ALL]
        for task in named if len(named) > 1 else []:
            table.add_row(Text(f"  {task}"), *_cells(tasks[task]), end_section=task == named[-1])
    legend = f"per sample: images, fewest-most (mean). size: median, and the largest below. texts: {unit}, median/most."
    lost = {split: len(keys) for split, keys in stats.unreadable.items() if keys}
    if lost:
        counted = ", ".join(f"{split} {count}" for split, count in lost.items())
        legend += f" Not counted, records that cannot be read: {counted}; `samtrain data lint` says why."
    table.caption, table.caption_justify = Text(legend), "left"
    return table


def _cells(group: GroupStats) -> list[str]:
    images, texts = summary(group.num_images), (summary(group.instruction), summary(group.output))
    size = "-"
    if group.sizes:
        widths, heights = zip(*group.sizes)
        largest = max(group.sizes, key=lambda size: size[0] * size[1])
        median = (round(np.median(widths)), round(np.median(heights)))
        size = f"{median[0]}x{median[1]}" + (f"\n{largest[0]}x{largest[1]}" if largest != median else "")
    return [
        f"{group.num_samples:,}",
        f"{sum(group.num_images):,}",
        f"{images['min']:.0f}-{images['max']:.0f} ({images['mean']:.1f})" if images else "-",
        size,
        *(f"{text['median']:.0f}/{text['max']:.0f}" if text else "-" for text in texts),
        f"{sum(group.instruction) + sum(group.output):,}",
    ]


def stats_figure(stats: SetStats) -> "Figure":
    """Distributions by split; shares, because splits are of unlike size. Works without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {split: tasks[ALL] for split, tasks in stats.splits.items() if tasks[ALL].num_samples}
    figure = Figure(figsize=(11, 10), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{stats.path.name or stats.path}: {sum(g.num_samples for g in groups.values()):,} samples")
    axes = figure.subplots(3, 2)
    _draw_counts(axes[0, 0], groups)
    _draw_sizes(axes[0, 1], groups)
    _draw_lengths(axes[1, 0], {s: g.instruction for s, g in groups.items()}, f"instruction, {stats.unit}")
    _draw_lengths(axes[1, 1], {s: g.output for s, g in groups.items()}, f"answer, {stats.unit}")
    _draw_tasks(axes[2, 0], stats)
    both = {s: [a + b for a, b in zip(g.instruction, g.output)] for s, g in groups.items()}
    _draw_cumulative(axes[2, 1], both, f"instruction and answer, {stats.unit}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize="small")
    return figure


def _draw_counts(axes: "Axes", groups: dict[str, GroupStats]) -> None:
    """Bars side by side: how many samples have so many images."""
    width = 0.8 / max(1, len(groups))
    for number, (split, group) in enumerate(groups.items()):
        counted = Counter(group.num_images)
        places = np.array(sorted(counted))
        shares = [100 * counted[place] / group.num_samples for place in places]
        axes.bar(places + (number - (len(groups) - 1) / 2) * width, shares, width, label=split, color=f"C{number % 10}")
    axes.locator_params(axis="x", integer=True)
    _label(axes, "images per sample", "images", "% of samples")


def _draw_sizes(axes: "Axes", groups: dict[str, GroupStats]) -> None:
    """A bubble for each size, its area by how many images of the split have it; the most frequent ones are named."""
    together: Counter[tuple[int, int]] = Counter()
    for number, group in enumerate(groups.values()):
        together.update(group.sizes)
        counted = Counter(group.sizes).most_common(_MAX_SIZES)
        if counted:
            sizes = np.array([size for size, _ in counted])
            shares = np.array([count for _, count in counted]) / len(group.sizes)
            axes.scatter(sizes[:, 0], sizes[:, 1], 15 + 250 * shares, color=f"C{number % 10}", alpha=0.5, linewidths=0)
    for size, count in together.most_common(3):
        text = f"{size[0]} x {size[1]}: {100 * count / together.total():.0f} %"
        axes.annotate(text, size, (-6, 8), textcoords="offset points", ha="right", fontsize="small")
    largest = max((max(size) for size in together), default=1)
    axes.set_xlim(0, 1.15 * largest)
    axes.set_ylim(0, 1.15 * largest)
    _label(axes, "image sizes", "width, px", "height, px")


def _draw_lengths(axes: "Axes", values: dict[str, list[int]], title: str) -> None:
    """Lines through shares, on bins that all splits have in common; what is above the 99.5th percentile is left out."""
    together = np.concatenate([np.asarray(lengths) for lengths in values.values()]) if values else np.zeros(1)
    highest = max(1, int(np.percentile(together, 99.5)))
    step = max(1, -(-highest // 40))
    edges = np.arange(0, highest + 2 * step, step) - 0.5
    for number, lengths in enumerate(values.values()):
        counted, _ = np.histogram(lengths, edges)
        axes.stairs(100 * counted / max(1, len(lengths)), edges, color=f"C{number % 10}", linewidth=1.5)
    _label(axes, title, title.rpartition(", ")[2], "% of samples")


def _draw_cumulative(axes: "Axes", values: dict[str, list[int]], title: str) -> None:
    """How many samples are at most so long: what a budget would hold."""
    for number, lengths in enumerate(values.values()):
        ordered = np.sort(np.asarray(lengths))
        axes.step(ordered, 100 * np.arange(1, len(ordered) + 1) / len(ordered), where="post", color=f"C{number % 10}")
    axes.set_ylim(0, 102)
    _label(axes, f"at most so long: {title}", title.rpartition(", ")[2], "% of samples")


def _draw_tasks(axes: "Axes", stats: SetStats) -> None:
    """Samples of each task, the splits on top of each other."""
    totals: Counter[str] = Counter()
    for tasks in stats.splits.values():
        totals.update({task: group.num_samples for task, group in tasks.items() if task != ALL})
    shown: Sequence[str] = [task for task, _ in totals.most_common(_MAX_TASKS)][::-1]
    left = np.zeros(len(shown))
    drawn = [split for split, tasks in stats.splits.items() if tasks[ALL].num_samples]
    for number, split in enumerate(drawn):
        counts = np.array([stats.splits[split].get(task, GroupStats()).num_samples for task in shown])
        axes.barh([task or "(none)" for task in shown], counts, left=left, color=f"C{number % 10}")
        left += counts
    more = len(totals) - len(shown)
    _label(axes, "samples of each task" + (f" ({more} more are not shown)" if more > 0 else ""), "samples", "")


def _label(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x, fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
