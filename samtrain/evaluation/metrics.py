"""ROUGE-L, CIDEr and BLEU-4 of answers, equal to the authors' scorer to every digit, without Java or network.

ROUGE-L is the mean F1 of the PyPI package `rouge` 1.0.1 (set semantics, sentences split at '.'); CIDEr is CIDEr-D
(n = 4, sigma = 6) with the idf of the evaluated set's own references; BLEU-4 is corpus BLEU with the closest
reference length; both from `pycocoevalcap` 1.2. One reference per sample, no tokenizer beyond white space.
CIDEr's idf comes from the set: values of sets of different size or content do not compare.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from samtrain.core.errors import InputError
from samtrain.evaluation.cleaning import clean, has_words
from samtrain.evaluation.predictions import find_predictions, read_predictions


@dataclass(frozen=True)
class Scores:
    """Scores of a set, in per cent rounded to two decimals as they are published.

    rouge_l_per_sample: F1 in 0..1 of each sample. cider_per_sample: CIDEr-D of each sample (0..10); the set's
    CIDEr is 100 x their mean. empty: indices of the predictions without words, which count 0.
    by_num_images: the same metrics and `num_samples` for the samples with so many images (empty where unknown).
    """

    rouge_l: float
    cider: float
    bleu_4: float
    num_samples: int
    rouge_l_per_sample: list[float] = field(repr=False)
    cider_per_sample: list[float] = field(repr=False)
    empty: list[int] = field(default_factory=list, repr=False)
    by_num_images: dict[int, dict[str, float]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The set's numbers as JSON, with 95 % bootstrap intervals of the two metrics that are means over samples."""
        return {
            "rouge_l": self.rouge_l,
            "cider": self.cider,
            "bleu_4": self.bleu_4,
            "num_samples": self.num_samples,
            "num_empty_predictions": len(self.empty),
            "rouge_l_interval": bootstrap_interval(self.rouge_l_per_sample),
            "cider_interval": bootstrap_interval(self.cider_per_sample),
            "by_num_images": {str(count): values for count, values in self.by_num_images.items()},
        }


def score_pairs(predictions: list[str], references: list[str], *, num_images: list[int] | None = None) -> Scores:
    """Score answers against one reference each.

    Args:
        predictions, references: raw texts, aligned; they are cleaned here.
        num_images: of each sample, for the breakdown.

    Raises:
        InputError: the lists differ in length or are empty, or a reference has no words after cleaning.
    """
    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions but {len(references)} references; give one for each")
    if num_images is not None and len(num_images) != len(references):
        raise InputError(f"{len(num_images)} image counts but {len(references)} references; give one for each")
    if not references:
        raise InputError("nothing to score: the set has no samples")
    hypotheses, targets = [clean(text) for text in predictions], [clean(text) for text in references]
    for index, target in enumerate(targets):
        if not has_words(target):
            raise InputError(f"sample {index}: the reference {references[index]!r} has no words after cleaning")
    empty = [index for index, hypothesis in enumerate(hypotheses) if not has_words(hypothesis)]
    for index in empty:
        hypotheses[index] = ""
    rouge_l = _rouge_l(hypotheses, targets)
    cider = _cider(hypotheses, targets)
    return Scores(
        rouge_l=_percent(float(np.mean(rouge_l))),
        cider=_percent(float(np.mean(cider))),
        bleu_4=_percent(_bleu_4(hypotheses, targets)),
        num_samples=len(targets),
        rouge_l_per_sample=rouge_l,
        cider_per_sample=cider,
        empty=empty,
        by_num_images=_by_num_images(hypotheses, targets, num_images, rouge_l, cider) if num_images else {},
    )


def score_directory(folder: str | Path) -> dict[str, Scores]:
    """Score every `<SET>/pred.json` below `folder`, or the one in it; the authors' layout.

    Returns:
        The scores by set, in alphabetical order.

    Raises:
        InputError: no predictions there, or a file that breaks the format: names file, index and key.
    """
    scores = {}
    for name, file in find_predictions(folder).items():
        rows = read_predictions(file)
        counts = [row.get("num_images") for row in rows]
        scores[name] = score_pairs(
            [row["pred_response"] for row in rows],
            [row["gt_response"] for row in rows],
            num_images=counts if all(isinstance(count, int) for count in counts) else None,  # type: ignore[arg-type]
        )
    return scores


def _by_num_images(
    hypotheses: list[str], references: list[str], num_images: list[int], rouge_l: list[float], cider: list[float]
) -> dict[int, dict[str, float]]:
    """Scores of the samples with so many images.

    ROUGE-L and CIDEr are means of the whole set's per-sample values, so CIDEr keeps one idf, the parts compare with
    each other, and the set's score is their mean weighted by size. BLEU-4 is the part's own corpus BLEU.
    """
    parts = {}
    for count in sorted(set(num_images)):
        chosen = [index for index, value in enumerate(num_images) if value == count]
        parts[count] = {
            "rouge_l": _percent(float(np.mean([rouge_l[i] for i in chosen]))),
            "cider": _percent(float(np.mean([cider[i] for i in chosen]))),
            "bleu_4": _percent(_bleu_4([hypotheses[i] for i in chosen], [references[i] for i in chosen])),
            "num_samples": len(chosen),
        }
    return parts


def bootstrap_interval(per_sample: list[float], *, num_resamples: int = 1000, seed: int = 0) -> list[float]:
    """95 % percentile interval [low, high] of 100 x the mean over samples (CIDEr: with the set's idf held fixed)."""
    values, generator = np.asarray(per_sample, dtype=np.float64), np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(num_resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [_percent(float(low)), _percent(float(high))]


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _rouge_l(hypotheses: list[str], references: list[str]) -> list[float]:
    """F1 per sample; 0 where the hypothesis is empty (the package refuses it)."""
    from rouge import Rouge

    scorer, values = Rouge(metrics=["rouge-l"]), []
    for hypothesis, reference in zip(hypotheses, references):
        if not hypothesis:
            values.append(0.0)
            continue
        # The package walks back through its table by recursion, one frame per word of either side.
        with _recursion_limit(len(hypothesis.split()) + len(reference.split()) + 1000):
            values.append(float(scorer.get_scores(hypothesis, reference)[0]["rouge-l"]["f"]))
    return values


def _cider(hypotheses: list[str], references: list[str]) -> list[float]:
    from pycocoevalcap.cider.cider import Cider

    _, values = Cider(n=4, sigma=6.0).compute_score(_by_index(references), _by_index(hypotheses))
    return [float(value) for value in values]


def _bleu_4(hypotheses: list[str], references: list[str]) -> float:
    from pycocoevalcap.bleu.bleu import Bleu

    scores, _ = Bleu(4).compute_score(_by_index(references), _by_index(hypotheses), verbose=0)
    return float(scores[3])


def _by_index(texts: list[str]) -> dict[int, list[str]]:
    return {index: [text] for index, text in enumerate(texts)}


@contextlib.contextmanager
def _recursion_limit(limit: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, limit))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
