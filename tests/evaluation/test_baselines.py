from samtrain.core.sample import SampleRecord
from samtrain.evaluation.baselines import majority_answers


def records(*pairs):
    return [SampleRecord(key=str(i), task=t, instruction="?", output=o, images=()) for i, (t, o) in enumerate(pairs)]


def test_majority_is_per_task_and_counts_spellings_of_one_answer_together():
    found = majority_answers(
        records(
            ("link", "An owl."), ("link", "an owl"), ("link", "An owl."), ("link", "A cat."), ("link", "A cat."),
            ("place", "left"),
        )
    )  # fmt: skip
    assert found == {"link": "An owl.", "place": "left"}


def test_ties_are_alphabetical_whatever_the_order():
    pairs = [("t", "b"), ("t", "a"), ("t", "c")]
    assert majority_answers(records(*pairs)) == majority_answers(records(*pairs[::-1])) == {"t": "a"}


def test_answers_without_words_do_not_win():
    assert majority_answers(records(("t", "."), ("t", "."), ("t", "yes"))) == {"t": "yes"}
