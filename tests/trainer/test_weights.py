from __future__ import annotations

import math

import numpy as np
import pytest

from cwpo.errors import DatasetError
from cwpo_trainer import weights

MARGINS = np.array([0.0, 1.0, 4.0, 1.0])
CONFIDENCES = np.tanh(MARGINS / 2)


def test_top_keeps_the_most_confident():
    assert weights.top(CONFIDENCES, 50).tolist() == [0, 1, 1, 0]
    assert weights.top(CONFIDENCES, 100).tolist() == [1, 1, 1, 1]
    assert weights.top(CONFIDENCES, 0.1).tolist() == [0, 0, 1, 0]


def test_the_margin_is_read_back_from_confidence():
    np.testing.assert_allclose(weights.margin(CONFIDENCES), MARGINS, rtol=1e-5)
    np.testing.assert_allclose(weights.normalised_margin(CONFIDENCES), MARGINS / 4, rtol=1e-5)


def test_a_confidence_of_one_has_a_finite_margin():
    assert 17 < weights.margin([1.0])[0] < 18


def test_per_prompt_a_weight_is_shared_by_the_pairs_of_its_prompt():
    shared = weights.per_prompt([0.5, 0.5, 1.0], [2, 2, 1])
    assert shared.tolist() == [0.25, 0.25, 1.0]
    assert shared.dtype == np.float32


def test_powers():
    np.testing.assert_allclose(weights.power([0.5, 0.1], 2), [0.25, 0.01], rtol=1e-6)
    np.testing.assert_allclose(weights.power([0.25], 0.5), [0.5], rtol=1e-6)


def test_entropy():
    # C = 1/2 predicts the label with probability 3/4.
    expected = 1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)
    np.testing.assert_allclose(weights.entropy([0.0, 0.5, 1.0]), [0, expected, 1], atol=1e-7)


def test_ties_share_their_rank():
    assert weights.rank(CONFIDENCES).tolist() == [0.25, 0.625, 1.0, 0.625]


@pytest.mark.parametrize("function", [weights.margin, weights.normalised_margin, weights.entropy])
def test_nothing_but_ties_is_refused(function):
    with pytest.raises(DatasetError, match="every weight is 0"):
        function([0.0, 0.0])
