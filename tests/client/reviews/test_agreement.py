from collections import Counter

import pytest

from cwpo.reviews.agreement import krippendorff_alpha, merged
from cwpo.reviews.pairs import ReviewAnswer

# The worked example of Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), section
# C: four observers, twelve units, five nominal values.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def answer(id, reviewer, preferred, annotator="a"):
    return ReviewAnswer(
        id=id,
        prompt=f"prompt {id}",
        response_a="yes",
        response_b="no",
        annotator=annotator,
        confidence=0.05,
        preferred=preferred,
        reviewer=reviewer,
    )


def test_alpha_is_that_of_the_worked_example():
    units = [Counter(value for value in unit if value) for unit in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_nothing_to_compare_is_unknown():
    assert krippendorff_alpha([Counter({"a": 1})]) is None
    assert krippendorff_alpha([Counter({"a": 2})]) is None
    assert krippendorff_alpha([Counter({"a": 1, "b": 1})]) == pytest.approx(0.0)


def test_most_votes_count_and_ties_and_splits_are_no_labels():
    labelled, report = merged(
        [
            *(answer("1", name, vote) for name, vote in [("x", "a"), ("y", "b"), ("z", "b")]),
            *(answer("2", name, vote) for name, vote in [("x", "a"), ("y", "b")]),
            answer("3", "x", "tie"),
            answer("4", "x", "a"),
        ]
    )
    assert [(pair.id, pair.preferred, pair.reviewers) for pair in labelled] == [
        ("1", "b", ["x", "y", "z"]),
        ("4", "a", ["x"]),
    ]
    assert (report.answers, report.labelled, report.ties, report.split) == (7, 2, 1, 1)
    # Of four pairs of answers (three to the first pair, one to the second), one is equal.
    assert (report.between_reviewers.share, report.between_reviewers.compared) == (0.25, 4)
    # The annotator said a of both labelled pairs.
    assert (report.with_annotator.share, report.with_annotator.compared) == (0.5, 2)
    # x answered a, a, tie, a.
    assert (report.reviewers["x"].share, report.reviewers["x"].compared) == (1.0, 3)


def test_the_last_answer_of_a_reviewer_counts():
    labelled, report = merged([answer("1", "x", "a"), answer("1", "x", "b")])
    assert [pair.preferred for pair in labelled] == ["b"]
    assert report.answers == 1


def test_pairs_of_one_id_with_other_texts_are_others():
    second = answer("1", "x", "b").model_copy(update={"response_b": "never"})
    labelled, _ = merged([answer("1", "x", "a"), second])
    assert [pair.preferred for pair in labelled] == ["a", "b"]
