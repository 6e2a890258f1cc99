"""The golden vector was made by running the authors' scorer."""

import contextlib
import io
import math
from collections import Counter

import pytest

from samtrain.core.errors import InputError
from samtrain.evaluation.cleaning import clean
from samtrain.evaluation.metrics import bootstrap_interval, score_pairs

GOLDEN = [
    (
        "Bobby helped Lizzy get back on her bike and they continued their ride.",
        "Bobby helped Lizzy get up, and they rode home together on the path.",
    ),
    (
        "A man and a woman are riding bikes down a path.",
        "They decided to go biking in the park instead, where there was no sand.",
    ),
    ("", "Some of the crafters even dress up in unique costumes as part of their selling act."),
    (
        "The dog's toy cost $1,200.50 - the owners didn't care!",
        "The dog's new toy cost $1,200, but the owners didn't mind.",
    ),
    ("the the the cat sat on the mat. the cat sat on the mat.", "The cat sat on the mat."),
]
PREDICTIONS, REFERENCES = [p for p, _ in GOLDEN], [r for _, r in GOLDEN]


def test_golden_vector_of_the_authors_scorer_to_every_digit():
    scores = score_pairs(PREDICTIONS, REFERENCES)
    assert (scores.rouge_l, scores.cider, scores.bleu_4) == (43.97, 151.52, 17.19)
    assert [round(v, 6) for v in scores.rouge_l_per_sample] == [0.461538, 0, 0, 0.736842, 1.0]
    assert [round(v, 5) for v in scores.cider_per_sample] == [2.87255, 0, 0, 2.84531, 1.85790]
    assert scores.empty == [2]


def test_nothing_is_printed():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        score_pairs(PREDICTIONS, REFERENCES)
    assert (out.getvalue(), err.getvalue()) == ("", "")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Up, and away", "up and away"),  # "mark space" occurs: the mark is deleted
        ("red/blue", "red blue"),  # it does not: a space
        ("red/blue / green", "redblue  green"),  # once it does, everywhere
        ("a-b costs 1,200", "ab costs 1200"),  # digit-comma-digit: every mark is deleted
        ("3.5 m. high.", "3.5 m high"),
        (" 'Quoted' ", "quoted"),
        ("line\none\ttab", "line one tab"),
        ("." * 40, "." * 8),  # at most 32 full stops
        ("", ""),
    ],
)
def test_cleaning_follows_the_authors_quirks(text, cleaned):
    assert clean(text) == cleaned


def test_a_full_stop_is_an_empty_prediction():
    with_stop = score_pairs(["a cat", ".", "." * 40], ["a cat", "a dog", "a bird"])
    without = score_pairs(["a cat", "", ""], ["a cat", "a dog", "a bird"])
    assert with_stop == without
    assert with_stop.empty == [1, 2]


@pytest.mark.parametrize("reference", ["", " ", ".", "?!", "." * 40])
def test_an_empty_reference_is_an_error_that_names_its_index(reference):
    with pytest.raises(InputError, match=r"sample 1: the reference"):
        score_pairs(["a", "b"], ["a", reference])


def test_lists_of_different_length_and_empty_sets_are_errors():
    with pytest.raises(InputError, match="2 predictions but 1 references"):
        score_pairs(["a", "b"], ["a"])
    with pytest.raises(InputError, match="no samples"):
        score_pairs([], [])


def test_long_texts_are_scored():
    text = " ".join(f"w{i}" for i in range(600))
    assert score_pairs([text, "x"], [text, "y"]).rouge_l == 50.0


def test_cider_equals_the_formula_written_out():
    """CIDEr-D from its definition (Vedantam et al. 2015), in plain float64."""
    predictions = ["a red cat sleeps on the mat", "two dogs run and run in a park", "the bird is blue"]
    references = ["a red cat sits on the mat", "two dogs run in the big park", "a bird sings"]

    def ngrams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    expected = []
    for prediction, reference in zip(predictions, references):
        total = 0.0
        for n in range(1, 5):
            df = Counter(gram for text in references for gram in ngrams(text, n))  # each occurs once per text here
            every = {gram for text in predictions + references for gram in ngrams(text, n)}
            idf = {gram: math.log(len(references)) - math.log(max(1, df[gram])) for gram in every}
            hyp = {g: c * idf[g] for g, c in ngrams(prediction, n).items()}
            ref = {g: c * idf[g] for g, c in ngrams(reference, n).items()}
            dot = sum(min(v, ref.get(g, 0.0)) * ref.get(g, 0.0) for g, v in hyp.items())
            norms = math.sqrt(sum(v * v for v in hyp.values())) * math.sqrt(sum(v * v for v in ref.values()))
            delta = len(prediction.split()) - len(reference.split())
            total += (dot / norms if norms else dot) * math.exp(-(delta**2) / 72)
        expected.append(10 * total / 4)
    assert score_pairs(predictions, references).cider_per_sample == pytest.approx(expected, abs=1e-9)


def test_parts_by_number_of_images_average_to_the_whole_set():
    whole = score_pairs(PREDICTIONS, REFERENCES, num_images=[2, 3, 2, 3, 3])
    assert list(whole.by_num_images) == [2, 3]
    for metric in ("rouge_l", "cider"):
        mean = sum(part[metric] * part["num_samples"] for part in whole.by_num_images.values()) / 5
        assert mean == pytest.approx(getattr(whole, metric), abs=0.01)  # both sides are rounded to two decimals


def test_bootstrap_interval_holds_the_mean_and_repeats():
    values = [0.1, 0.4, 0.5, 0.9] * 25
    low, high = bootstrap_interval(values)
    assert low < 47.5 < high
    assert bootstrap_interval(values) == [low, high]
    assert bootstrap_interval([0.5] * 10) == [50.0, 50.0]
