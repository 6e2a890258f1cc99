"""Predictions on disk, in the authors' layout: `<save>/<SET>/pred.json` = [{sample_id, pred_response, gt_response}].

Files of other people are read strictly: what breaks the format is named by file, index and key. Keys beyond the
three are kept and ignored; ours adds `num_images`, which the breakdown reads.
"""

import json
from pathlib import Path
from typing import Any

from samtrain.core.errors import InputError
from samtrain.core.files import atomic_write
from samtrain.evaluation.cleaning import clean, has_words

FILE_NAME = "pred.json"
KEYS = ("sample_id", "pred_response", "gt_response")


def write_predictions(folder: str | Path, set_name: str, rows: list[dict[str, Any]]) -> Path:
    """Write `<folder>/<set_name>/pred.json`, whole or not at all; returns its path.

    Args:
        rows: one dictionary a sample with at least `sample_id`, `pred_response`, `gt_response`.
    """
    for index, row in enumerate(rows):
        for key in KEYS:
            if key not in row:
                raise InputError(f"{set_name}: row {index} has no `{key}`")
    path = Path(folder) / set_name / FILE_NAME
    atomic_write(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return path


def find_predictions(folder: str | Path) -> dict[str, Path]:
    """Set name -> its file, in alphabetical order: of `folder` itself, or of all its sub-folders that hold one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that holds <SET>/{FILE_NAME}")
    if (folder / FILE_NAME).is_file():
        return {folder.resolve().name: folder / FILE_NAME}
    found = {path.parent.name: path for path in sorted(folder.glob(f"*/{FILE_NAME}"))}
    if not found:
        raise InputError(f"{folder}: no predictions; expected {folder / FILE_NAME} or {folder / '<SET>' / FILE_NAME}")
    return found


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """Read and check one file.

    Raises:
        InputError: naming file, index and key: not JSON, not a list of objects, a missing key, a response that is not
            text, a reference without words, a `sample_id` given twice.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{path}: not valid JSON in UTF-8: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of predictions, found {type(rows).__name__}")
    if not rows:
        raise InputError(f"{path}: holds no predictions")
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        _check_row(row, where=f"{path}: index {index}")
        identity = json.dumps(row["sample_id"])
        if identity in seen:
            raise InputError(f"{path}: index {index}: `sample_id` {identity} stands at index {seen[identity]} already")
        seen[identity] = index
    return rows


def _check_row(row: Any, *, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {type(row).__name__}")
    for key in KEYS:
        if key not in row:
            raise InputError(f"{where}: no `{key}`; keys found: {', '.join(map(str, row)) or 'none'}")
    if isinstance(row["sample_id"], bool) or not isinstance(row["sample_id"], (int, str)):
        raise InputError(f"{where}: `sample_id` = {row['sample_id']!r}, expected a number or text")
    for key in ("pred_response", "gt_response"):
        if not isinstance(row[key], str):
            raise InputError(f"{where}: `{key}` = {row[key]!r}, expected text")
    if not has_words(clean(row["gt_response"])):
        raise InputError(
            f"{where} (sample_id {row['sample_id']!r}): the reference `gt_response` {row['gt_response']!r} has no words"
        )
