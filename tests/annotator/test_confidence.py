import math

import numpy as np
import pytest

from cwpo_annotator.confidence import NonFiniteScoreError, confidence, preferred


def test_confidence_is_eq_8_by_hand():
    # margin ln 3: sigmoid = 3/4, so C = 2 (3/4 - 1/2) = 1/2
    assert confidence(np.array([math.log(3)]), np.array([0.0])) == pytest.approx(0.5)
    assert confidence(np.array([0.0]), np.array([math.log(3)])) == pytest.approx(0.5)


def test_confidence_of_a_tie_is_zero():
    assert confidence(np.array([1.25]), np.array([1.25]))[0] == 0.0


def test_confidence_matches_the_sigmoid_form_in_float64():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=1000) * 3, rng.normal(size=1000) * 3
    expected = 2 * (1 / (1 + np.exp(-np.abs(a - b))) - 0.5)
    np.testing.assert_allclose(confidence(a, b), expected, atol=1e-6)


def test_a_temperature_divides_the_margin():
    assert confidence(np.array([2 * math.log(3)]), np.array([0.0]), 2.0) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_refused(bad):
    with pytest.raises(NonFiniteScoreError):
        confidence(np.array([0.0, bad]), np.array([0.0, 0.0]))


def test_preferred_is_the_higher_score_or_a_tie():
    scores_a, scores_b = np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, 0.5])
    assert preferred(scores_a, scores_b) == ["a", "b", "tie"]
