"""A picture of a run: images a second, and how evenly ranks work."""

from pathlib import Path
from typing import Any

MARKERS = {"padding": "s", "naive": "^", "ours": "o"}
COLOURS = {"ours": "tab:blue", "peer": "tab:gray", "mixed": "tab:olive"}


def draw(path: Path, content: dict[str, Any]) -> None:
    """Write the figure of what was measured; rows without a number are not in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    packed = content["packing"]
    sets = list(dict.fromkeys(row["set"] for row in packed))
    rows = [row for row in content["loading"] if row["match"] == "ok"]
    figure, axes = plt.subplots(
        1, 1 + len(sets), figsize=(6.5 + 4.2 * len(sets), 4.4), width_ratios=[1.5, *[1] * len(sets)]
    )
    left = axes[0]
    rates = [row["images_per_second"] for row in rows]
    medians = [rate["median"] for rate in rates]
    errors = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    left.barh([row["label"] for row in rows], medians, xerr=errors, color=[COLOURS[row["family"]] for row in rows])
    left.invert_yaxis()
    left.set_xlabel(f"images/s on {len(content['header']['cores'])} cores (bars: smallest to largest)")
    left.tick_params(axis="y", labelsize=8)
    for axis, name in zip(axes[1:], sets):
        for method, marker in MARKERS.items():
            points = [
                (r["ranks"], 100 * r["waiting_share"]) for r in packed if (r["set"], r["method"]) == (name, method)
            ]
            axis.plot(*zip(*points), marker=marker, label=method)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("ranks")
        axis.set_ylabel("rank time spent waiting, %")
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    header = content["header"]
    figure.suptitle(f"{header['cpu']}, {header['date']}, commit {header['commit'][:12]}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
