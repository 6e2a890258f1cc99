"""Scores as rows and as a table for a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from samtrain.evaluation.metrics import Scores

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ["set", "images", "samples", "ROUGE-L", "CIDEr", "BLEU-4", "empty", "ROUGE-L majority", "CIDEr majority"]


def score_rows(sets: Mapping[str, Scores], *, majority: Mapping[str, Scores] | None = None) -> list[list[str]]:
    """A row of `COLUMNS` per set, then one per number of images where a set has several.

    majority: the scores of the most frequent training answer on the same sets, where known.
    """
    rows = []
    for name, scores in sets.items():
        baseline = (majority or {}).get(name)
        extra = [f"{baseline.rouge_l:.2f}", f"{baseline.cider:.2f}"] if baseline else ["", ""]
        images = str(next(iter(scores.by_num_images))) if len(scores.by_num_images) == 1 else "all"
        metrics = [f"{scores.rouge_l:.2f}", f"{scores.cider:.2f}", f"{scores.bleu_4:.2f}"]
        rows.append([name, images, str(scores.num_samples), *metrics, str(len(scores.empty)), *extra])
        if len(scores.by_num_images) > 1:
            for count, part in scores.by_num_images.items():
                values = [f"{part[metric]:.2f}" for metric in ("rouge_l", "cider", "bleu_4")]
                rows.append(["", str(count), str(part["num_samples"]), *values, "", "", ""])
    return rows


def scores_table(sets: Mapping[str, Scores], *, majority: Mapping[str, Scores] | None = None) -> "Table":
    """The rows as a rich table; columns that say nothing are left out, empty predictions are explained."""
    from rich.table import Table

    rows = score_rows(sets, majority=majority)
    num_empty = sum(len(scores.empty) for scores in sets.values())
    caption = f"{num_empty} empty predictions count 0 (a lone full stop is one)" if num_empty else None
    table = Table(caption=caption)
    shown = [c for c in range(len(COLUMNS)) if any(row[c] not in ("", "0") for row in rows)]
    for column in shown:
        table.add_column(COLUMNS[column], justify="left" if column == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[column] for column in shown))
    return table
