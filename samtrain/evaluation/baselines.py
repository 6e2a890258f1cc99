"""The score that knows the language of the answers but no image: what a model has to beat."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from samtrain.core.sample import SampleRecord
from samtrain.evaluation.cleaning import clean, has_words


def majority_answers(records: Iterable[SampleRecord]) -> dict[str, str]:
    """The most frequent training answer of each task, to be predicted for every held-out sample of it.

    Answers that clean to the same text are one answer, as they are one to the metrics; the returned text is that
    answer's most frequent spelling. Ties go to the alphabetically first, so the result depends on the set alone.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    spellings: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for record in records:
        cleaned = clean(record.output)
        if has_words(cleaned):
            answers[record.task][cleaned] += 1
            spellings[record.task, cleaned][record.output] += 1
    return {task: _first(spellings[task, _first(counts)]) for task, counts in sorted(answers.items())}


def _first(counts: Counter[str]) -> str:
    return min(counts, key=lambda text: (-counts[text], text))
