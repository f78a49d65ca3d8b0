"""Labels, errors and scores that are none come out where their triplets went in."""

import numpy as np
import pytest

from cwpo.types import Annotation, FailedAnnotation, ItemError
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.labels import Labels
from cwpo_annotator.scores import Scores

TOO_LONG = ItemError(code="too_long", detail="5 tokens")
PAIR, CUT = EncodedPair([1], [2]), EncodedPair([1], [2], truncated=True)
ENCODED = [TOO_LONG, PAIR, PAIR, TOO_LONG, CUT, PAIR, PAIR, TOO_LONG]
VALUES = np.array([[1, 0], [np.nan, 0], [0, 2], [0, np.nan], [3, 3]], np.float32)
SCORES = Scores(VALUES, np.array([False, False, False, True, False]))


def labels(temperature=None):
    return Labels.of([f"t{n}" for n in range(len(ENCODED))], ENCODED, SCORES, temperature)


def test_every_triplet_has_its_row_in_input_order():
    rows = labels().annotations()
    assert [row.id for row in rows] == [f"t{n}" for n in range(len(ENCODED))]
    assert [row.preferred if isinstance(row, Annotation) else row.error.code for row in rows] == [
        "too_long",
        "a",
        "non_finite_score",
        "too_long",
        "b",
        "out_of_memory",
        "tie",
        "too_long",
    ]
    assert [row.truncated for row in rows if isinstance(row, Annotation)] == [False, True, False]


def test_confidence_is_eq_8_and_calibrated_at_the_temperature():
    of_paper, calibrated = labels(), labels(temperature=2.0)
    np.testing.assert_allclose(of_paper.confidence, np.tanh([0.5, 1.0, 0.0]), rtol=1e-6)
    assert of_paper.calibrated_confidence is None
    for row in calibrated.annotations():
        if not isinstance(row, FailedAnnotation):
            margin = abs(row.score_a - row.score_b)
            assert row.calibrated_confidence == pytest.approx(np.tanh(margin / 4), rel=1e-6)
            assert row.confidence == pytest.approx(np.tanh(margin / 2), rel=1e-6)


def test_there_may_be_nothing_to_label():
    nothing = Labels.of(["x"], [TOO_LONG], Scores(np.empty((0, 2), np.float32)))
    assert nothing.rows() == [{"id": "x", "error": TOO_LONG}]
    assert nothing.confidence.shape == (0,)
