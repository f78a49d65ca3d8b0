from __future__ import annotations

import numpy as np
import pytest

from cwpo_annotator.calibration import fit_temperature, likelihood_loss


def margins_at(temperature: float, count: int = 20_000) -> np.ndarray:
    """Margins of an annotator whose labels are right with probability sigmoid(margin / T)."""
    draw = np.random.default_rng(0)
    certain = draw.exponential(1.5, count)
    is_right = draw.random(count) < 1 / (1 + np.exp(-certain))
    return temperature * np.where(is_right, certain, -certain)


@pytest.mark.parametrize("temperature", [0.02, 1.0, 7.5])
def test_the_known_temperature_is_found(temperature):
    assert fit_temperature(margins_at(temperature)) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_is_likelier():
    margins = margins_at(3.0)
    fitted = fit_temperature(margins)
    lowest = likelihood_loss(margins, fitted)
    for factor in (0.9, 1.1):
        assert likelihood_loss(margins, factor * fitted) > lowest
    assert likelihood_loss(margins) > lowest


def test_the_temperature_goes_with_the_scale_of_the_scores():
    margins = margins_at(1.0, 500)
    assert fit_temperature(1e-3 * margins) == pytest.approx(1e-3 * fit_temperature(margins))


def test_margins_that_are_all_right_leave_a_finite_confidence():
    # Platt's labels: 4 pairs count as right with probability 5/6, sigmoid(log 5).
    assert fit_temperature([2.0] * 4) == pytest.approx(2.0 / np.log(5))


@pytest.mark.parametrize("margins", [[], [0.0, 0.0], [-1.0, 0.5], [1.0, -1.0]])
def test_an_annotator_no_better_than_chance_has_none(margins):
    assert fit_temperature(margins) is None


def test_the_loss_is_worked_by_hand():
    expected = (np.log(1 + np.exp(-1.0)) + np.log(1 + np.exp(0.5))) / 2
    assert likelihood_loss([2.0, -1.0], 2.0) == pytest.approx(expected)
