"""Scores and context gains as rows and as tables for a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from samtrain.evaluation.metrics import Scores

if TYPE_CHECKING:  # `samtrain score` starts without torch
    from rich.table import Table

    from samtrain.evaluation.context_gain import ContextGain

GAIN_COLUMNS = ["set", "images", "samples", "loss", "no context", "shuffled", "gain over none", "gain over shuffled"]
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
    num_empty = sum(len(scores.empty) for scores in sets.values())
    caption = f"{num_empty} empty predictions count 0 (a lone full stop is one)" if num_empty else None
    return _table(COLUMNS, score_rows(sets, majority=majority), caption=caption)


def context_gain_rows(sets: "Mapping[str, ContextGain]") -> list[list[str]]:
    """A row of `GAIN_COLUMNS` per set, then one per number of images where a set has several."""
    rows = []
    for name, gain in sets.items():
        parts = gain.by_num_images
        rows.append(_gain_row(name, str(next(iter(parts))) if len(parts) == 1 else "all", gain))
        if len(parts) > 1:
            rows += [_gain_row("", str(count), part) for count, part in parts.items()]
    return rows


def context_gain_table(sets: "Mapping[str, ContextGain]") -> "Table":
    """The rows as a rich table, with what its numbers are."""
    caption = "nats per label token"
    left_out = sum(gain.num_samples - gain.num_shuffled for gain in sets.values())
    if left_out:
        caption += f"; {left_out} samples have no context to shuffle and are left out of `shuffled`"
    return _table(GAIN_COLUMNS, context_gain_rows(sets), caption=caption)


def _gain_row(name: str, images: str, gain: "ContextGain") -> list[str]:
    losses = [_number(loss, "{:.4f}") for loss in (gain.loss, gain.loss_none, gain.loss_shuffled)]
    return [
        name, images, str(gain.num_samples), *losses,
        *(_number(value, "{:+.4f}") for value in (gain.gain_none, gain.gain_shuffled)),
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(columns: list[str], rows: list[list[str]], *, caption: str | None) -> "Table":
    from rich.table import Table

    table = Table(caption=caption)
    shown = [c for c in range(len(columns)) if any(row[c] not in ("", "0") for row in rows)]
    for column in shown:
        table.add_column(columns[column], justify="left" if column == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[column] for column in shown))
    return table
