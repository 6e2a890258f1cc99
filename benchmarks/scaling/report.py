"""The study as text, JSON and a figure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.grid import grid
from benchmarks.scaling.study import STRATEGIES, Assumptions, stops_at

Row = dict[str, Any]

# field.md's figures: their authors' own, other models and lengths; MFU is what compares.
PUBLISHED = (
    ("LLaVA-1.5 13B fine-tune, 8 x A100, ZeRO-3", "1.15 samples/s/GPU"),
    ("13B LLM, 8 x H100, sequence 2048 (LLM Foundry)", "39.8 % MFU"),
    ("7B on 1 / 13B on 8 H200 (KempnerForge)", "57.8 / 44.4 % MFU"),
    ("Qwen2.5-VL fine-tune, unpacked / packed (lmms-engine)", "20-25 / 35-40 % MFU"),
    ("DistTrain 72B / OrchMLLM 84B", "54.7 / 41.6 % MFU"),
)


def write(
    path: Path, header: Mapping[str, Any], assumptions: Mapping[str, Assumptions], rows: Sequence[Row], *, text: str
) -> None:
    """assumptions: of each recipe, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {name: own.to_dict() for name, own in assumptions.items()}
    content = {"header": dict(header), "assumptions": given, "text": text, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".txt").write_text(whole_text(header, assumptions, rows, text=text) + "\n")


def whole_text(
    header: Mapping[str, Any], assumptions: Mapping[str, Assumptions], rows: Sequence[Row], *, text: str
) -> str:
    parts = ["\n".join(head(header, assumptions, text=text))]
    for key in dict.fromkeys((row["recipe"], row["scaling"], row["strategy"]) for row in rows):
        parts.append(table_text([r for r in rows if (r["recipe"], r["scaling"], r["strategy"]) == key]))
    return "\n\n".join([*parts, verdicts_text(rows), published_text(rows)])


def head(header: Mapping[str, Any], assumptions: Mapping[str, Assumptions], *, text: str) -> list[str]:
    by_source: dict[str, list[str]] = {}
    for name, own in assumptions.items():
        by_source.setdefault(own.seconds.describe(), []).append(name)
    network = next(iter(assumptions.values())).network
    return [
        "COMPUTED, NOT MEASURED: ZeRO-3 by arithmetic and event simulation; no such cluster has run this.",
        "Time of a part on one GPU: its real work at a share of the peak.",
        *(f"  {', '.join(names)}: {source}" for source, names in by_source.items()),
        f"network: {network.describe()}",
        f"samples: {text}; weak: 16 a GPU, strong: 128 in all; every step packed and dealt by the loader's own code",
        "MFU: real work of the step. exposed: share of the step that waits for communication. imbalance: share that",
        "the slowest rank of each round costs beyond the mean. gathered, reduced: of one GPU in a step, padded.",
        f"commit {header['commit'][:12]}",
    ]


def table_text(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = f"{first['recipe']}, {first['scaling']} scaling: {STRATEGIES[first['strategy']].label}"
    columns = ["GPUs", "samples", "rounds", "step s", "samples/s/GPU", "of 8 GPUs", "MFU", "exposed", "imbalance"]
    columns += ["gathered GB", "reduced GB", "memory GB"]
    lines = [columns]
    for row in rows:
        lines.append(
            [
                str(row["world_size"]),
                str(row["samples"]),
                str(row["rounds"]),
                f"{row['step_seconds']:.3f}",
                f"{row['samples_per_second_per_gpu']:.1f}",
                f"{100 * row['efficiency']:.0f} %",
                f"{100 * row['mfu']:.1f} %",
                f"{100 * row['exposed_communication']:.0f} %",
                f"{100 * row['imbalance']:.0f} %",
                f"{row['gathered_bytes'] / 1e9:.1f}",
                f"{row['reduced_bytes'] / 1e9:.2f}",
                f"{row['memory_bytes'] / 1e9:.0f}{'' if row['fits'] else ' (too much)'}",
            ]
        )
    return "\n".join([title, grid(lines, left=[])])


def verdicts_text(rows: Sequence[Row]) -> str:
    """Where each recipe stops scaling, and what goes on."""
    lines = ["Where a GPU does less than 80 % of what it does on 8, weak scaling:"]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        found = []
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            own = [r for r in rows if (r["recipe"], r["scaling"], r["strategy"]) == (recipe, "weak", strategy)]
            if not own:
                continue
            where = stops_at(own)
            told = f"{where} GPUs" if where else f"not up to {own[-1]['world_size']}"
            fits = "" if all(row["fits"] for row in own) else ", does not fit everywhere"
            found.append(f"{strategy}: {told}{fits}")
        if found:
            lines.append(f"  {recipe}: " + "; ".join(found))
    return "\n".join(lines)


def published_text(rows: Sequence[Row]) -> str:
    lines = ["Published by their authors, on other models and lengths:"]
    lines += [f"  {name}: {value}" for name, value in PUBLISHED]
    lines.append("Ours, computed, 8 GPUs:")
    for row in rows:
        if (row["world_size"], row["scaling"], row["strategy"]) == (8, "weak", "partitioned"):
            speed = f"{row['samples_per_second_per_gpu']:.1f} samples/s/GPU"
            lines.append(f"  {row['recipe']}: {100 * row['mfu']:.1f} % MFU, {speed}")
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Samples a second and GPU against GPUs, a panel for every recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weak = [row for row in rows if row["scaling"] == "weak"]
    recipes = list(dict.fromkeys(row["recipe"] for row in weak))
    figure, axes = plt.subplots(1, len(recipes), figsize=(3.6 * len(recipes), 3.6), squeeze=False, layout="constrained")
    for axis, recipe in zip(axes[0], recipes):
        for strategy in _strategies(weak, recipe):
            own = [r for r in weak if r["recipe"] == recipe and r["strategy"] == strategy]
            axis.plot(
                [r["world_size"] for r in own], [100 * r["mfu"] for r in own], marker="o", markersize=3, label=strategy
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
        axis.set_ylim(0)
        axis.set_title(recipe)
        axis.set_xlabel("GPUs")
    axes[0][0].set_ylabel("MFU, %")
    axes[0][0].legend(fontsize=7)
    figure.suptitle("ZeRO-3, 16 samples a GPU: computed, not measured")
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)


def _strategies(rows: Iterable[Row], recipe: str) -> list[str]:
    return list(dict.fromkeys(row["strategy"] for row in rows if row["recipe"] == recipe))
