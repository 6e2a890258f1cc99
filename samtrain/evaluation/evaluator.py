"""Generate answers for held-out splits with all ranks, and score them per set and per number of images; where it is
asked for, also measure what the context is worth (context_gain.py).

A set is one task of a split, `<split>.<task>`. Samples are ordered by cost inside, so that a batch holds prompts of
similar length and the largest comes first (memory that is too small shows at once); whole batches are dealt to the
ranks, so the same answers come out for any number of ranks, and up to rounding for any batch size. Rows come back in
the splits' own order, on every rank.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samtrain.core.distributed import broadcast_object, is_main_process
from samtrain.core.errors import DataError
from samtrain.core.events import Emit, discard
from samtrain.core.files import atomic_write_json
from samtrain.core.sample import SampleRecord
from samtrain.data.index import ShardIndex
from samtrain.data.loader import read_for_generation
from samtrain.data.mixture import SampleSet
from samtrain.data.options import DataOptions
from samtrain.data.storage import Location
from samtrain.evaluation.baselines import majority_answers
from samtrain.evaluation.cleaning import clean, has_words
from samtrain.evaluation.context_gain import (
    ContextGain,
    SampleLosses,
    check_context,
    context_gains,
    measure_losses,
)
from samtrain.evaluation.dealing import cost_ordered_batches, deal
from samtrain.evaluation.metrics import Scores, score_pairs
from samtrain.evaluation.options import EvaluationOptions
from samtrain.evaluation.predictions import write_predictions
from samtrain.evaluation.report import COLUMNS, GAIN_COLUMNS, context_gain_rows, score_rows
from samtrain.generation.generate import Item, generate_batch
from samtrain.generation.options import GenerationOptions
from samtrain.tracking.protocol import Example

if TYPE_CHECKING:
    from samtrain.model import SamMllmForConditionalGeneration, SamMllmProcessor

SCORES_FILE = "scores.json"
_RECORDS = 512  # read at once
METRICS = ("rouge_l", "cider", "bleu_4")


@dataclass(frozen=True)
class EvaluationRow:
    """One answer. index: the sample's place in its split."""

    split: str
    index: int
    set_name: str
    task: str
    key: str
    num_images: int
    instruction: str
    prediction: str
    reference: str


@dataclass(frozen=True)
class EvaluationResult:
    """Answers in order, scores by set, the scores of the majority answer where a task has one, examples on rank 0, and
    by set what the context is worth, where that was asked for."""

    rows: list[EvaluationRow]
    scores: dict[str, Scores]
    majority_scores: dict[str, Scores] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    context_gain: dict[str, ContextGain] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker: eval/<set>/cider, eval/<set>/images_3/cider, eval/<set>/majority/cider,
        eval/<set>/context_gain_none, ..."""
        found: dict[str, float] = {}
        for name, scores in self.scores.items():
            found |= _metrics(f"eval/{name}", vars(scores))
            if len(scores.by_num_images) > 1:
                for count, part in scores.by_num_images.items():
                    found |= _metrics(f"eval/{name}/images_{count}", part)
        for name, scores in self.majority_scores.items():
            found |= _metrics(f"eval/{name}/majority", vars(scores))
        for name, gain in self.context_gain.items():
            parts = {f"eval/{name}/images_{count}": part for count, part in gain.by_num_images.items()}
            for prefix, some in ({f"eval/{name}": gain} | (parts if len(parts) > 1 else {})).items():
                found |= {f"{prefix}/{metric}": value for metric, value in some.metrics().items()}
        return found

    def event(self, *, title: str = "evaluation") -> dict[str, Any]:
        """An "eval" event: the scores as a table."""
        rows = score_rows(self.scores, majority=self.majority_scores)
        return {"kind": "eval", "title": title, "columns": COLUMNS, "rows": rows}

    def context_gain_event(self) -> dict[str, Any]:
        """An "eval" event: what the context is worth as a table."""
        title = "losses by context, in nats per label token"
        return {"kind": "eval", "title": title, "columns": GAIN_COLUMNS, "rows": context_gain_rows(self.context_gain)}

    def to_dict(self) -> dict[str, Any]:
        values = {
            "scores": {name: scores.to_dict() for name, scores in self.scores.items()},
            "majority": {name: scores.to_dict() for name, scores in self.majority_scores.items()},
        }
        if self.context_gain:
            values["context_gain"] = {name: gain.to_dict() for name, gain in self.context_gain.items()}
        return values

    def write(self, folder: str | Path) -> None:
        """`<folder>/<set>/pred.json` in the authors' layout, which `samtrain score` reads, and `scores.json`."""
        for name in self.scores:
            rows = [
                {
                    "sample_id": row.key,
                    "pred_response": row.prediction,
                    "gt_response": row.reference,
                    "num_images": row.num_images,
                    "instruction": row.instruction,
                }
                for row in self.rows
                if row.set_name == name
            ]
            write_predictions(folder, name, rows)
        atomic_write_json(Path(folder) / SCORES_FILE, self.to_dict())


def evaluate_splits(
    model: "SamMllmForConditionalGeneration",
    processor: "SamMllmProcessor",
    folders: Mapping[str, str | Location],
    *,
    options: EvaluationOptions,
    generation: GenerationOptions,
    data: DataOptions,
    train: SampleSet | None = None,
    emit: Emit = discard,
) -> EvaluationResult:
    """Answer every sample of every split; to be called by all ranks, which all get the whole result.

    Args:
        model: whole on every rank (the exported one), not partitioned.
        folders: name of the split -> its folder of shards, or its URL.
        options: samples a rank generates at once, samples of each split, examples to keep, and whether to measure the
            gain of the context.
        data: for its limit on image sizes.
        train: the training samples, whose most frequent answers are scored as a baseline.
        emit: hears {"kind": "progress", "what", "done", "total"}, in samples over all ranks.

    Raises:
        DataError: a sample cannot be read or does not fit the model; held-out samples are never left out.
        InputError: the gain of the context is asked for and the model reads none.
    """
    if options.context_gain:
        check_context(model.config)
    splits = {split: ShardIndex.load(folder, remote=data.remote) for split, folder in folders.items()}
    rows: list[EvaluationRow] = []
    losses: list[SampleLosses] = []  # of the same samples
    for split, index in splits.items():
        count = min(options.max_samples or len(index), len(index))
        # Before the hours of generation.
        records = [_checked(record, index) for record in index.read_records(range(count))]
        answers = _answers(
            model, processor, index, count, data=data, generation=generation, batch_size=options.batch_size,
            what=f"generating {split}", emit=emit,
        )  # fmt: skip
        rows += [_row(split, record, i, answers[i]) for i, record in enumerate(records)]
        if options.context_gain:
            sets = [set_name(split, record.task) for record in records]
            losses += measure_losses(
                model, processor, index, sets, data=data, batch_size=options.batch_size,
                what=f"measuring the context of {split}", emit=emit,
            )  # fmt: skip
    scores, majority_scores = _scores(rows, _majority(train))
    shown = _examples(rows, list(scores), splits, data=data, count=options.num_examples) if is_main_process() else []
    gains = context_gains([row.set_name for row in rows], losses) if options.context_gain else {}
    return EvaluationResult(rows, scores, majority_scores, shown, gains)


def _majority(train: SampleSet | None) -> dict[str, str]:
    """Task -> most frequent training answer; rank 0 reads the records for all."""
    found = None
    if train is not None and is_main_process():
        found = majority_answers(_readable(train))
    return broadcast_object(found) or {}


def _readable(train: SampleSet) -> Iterator[SampleRecord]:
    """Records of the training set; those that cannot be read were skipped in training too, and named there."""
    for start in range(0, len(train), _RECORDS):
        for record in train.read_records(range(start, min(start + _RECORDS, len(train)))):
            if not isinstance(record, DataError):
                yield record


def _examples(
    rows: list[EvaluationRow], sets: list[str], splits: Mapping[str, ShardIndex], *, data: DataOptions, count: int
) -> list[Example]:
    """The first generations of every set in turn, with their images."""
    by_set = [[row for row in rows if row.set_name == name] for name in sets]
    turns = [members[i] for i in range(max(map(len, by_set), default=0)) for members in by_set if i < len(members)]
    shown = []
    for row in turns[:count]:
        _, images = read_for_generation(splits[row.split], row.index, data)
        shown.append(Example(f"{row.set_name}: {row.key}", images, row.instruction, row.prediction, row.reference))
    return shown


def _answers(
    model: "SamMllmForConditionalGeneration",
    processor: "SamMllmProcessor",
    index: ShardIndex,
    count: int,
    *,
    data: DataOptions,
    generation: GenerationOptions,
    batch_size: int,
    what: str,
    emit: Emit,
) -> dict[int, str]:
    """Sample -> answer, of the first `count` samples, on every rank."""

    def answer(chosen: Sequence[int]) -> list[str]:
        index.prefetch_images(chosen)
        items = [_item(index, i, data, processor) for i in chosen]
        return generate_batch(model, processor, items, generation)

    batches = cost_ordered_batches(index, count, batch_size=batch_size)
    return deal(batches, answer, what=what, emit=emit)


def _item(index: ShardIndex, i: int, data: DataOptions, processor: "SamMllmProcessor") -> Item:
    record, images = read_for_generation(index, i, data)
    # Checked here under the sample's own key; a batch only knows places.
    processor.encode(key=record.key, instruction=record.instruction, output=None, num_images=len(images))
    return record.instruction, images


def _checked(record: SampleRecord | DataError, index: ShardIndex) -> SampleRecord:
    if isinstance(record, DataError):
        raise record
    if not has_words(clean(record.output)):
        raise DataError(f"{index.folder}: {record.key}: the reference answer {record.output!r} has no words to score")
    return record


def _row(split: str, record: SampleRecord, i: int, prediction: str) -> EvaluationRow:
    return EvaluationRow(
        split=split,
        index=i,
        set_name=set_name(split, record.task),
        task=record.task,
        key=record.key,
        num_images=len(record.images),
        instruction=record.instruction,
        prediction=prediction,
        reference=record.output,
    )


def set_name(split: str, task: str) -> str:
    """`<split>.<task>`, fit for a folder and a metric; an empty task leaves the split's name alone."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", f"{split}.{task}" if task else split)


def _scores(rows: list[EvaluationRow], majority: Mapping[str, str]) -> tuple[dict[str, Scores], dict[str, Scores]]:
    sets: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        sets.setdefault(row.set_name, []).append(row)
    scores, baselines = {}, {}
    for name, members in sets.items():
        references, counts = [row.reference for row in members], [row.num_images for row in members]
        scores[name] = score_pairs([row.prediction for row in members], references, num_images=counts)
        if all(row.task in majority for row in members):
            guesses = [majority[row.task] for row in members]
            baselines[name] = score_pairs(guesses, references, num_images=counts)
    return scores, baselines


def _metrics(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {f"{prefix}/{metric}": float(values[metric]) for metric in METRICS}
