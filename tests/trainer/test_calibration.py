from __future__ import annotations

import numpy as np
import pytest

from cwpo_trainer.annotators.calibration import temperature


def margins_at(true_temperature: float, pairs: int = 20_000) -> np.ndarray:
    """Margins of an annotator that is right with probability sigmoid(|margin| / T)."""
    draw = np.random.default_rng(0)
    sizes = draw.exponential(2.0, pairs)
    is_right = draw.random(pairs) < 1 / (1 + np.exp(-sizes / true_temperature))
    return np.where(is_right, sizes, -sizes).astype(np.float32)


@pytest.mark.parametrize("true_temperature", [0.02, 0.5, 1.0, 4.0])
def test_finds_the_temperature(true_temperature):
    # A timid annotator (T < 1) has small margins for how often it is right.
    found = temperature(margins_at(1.0) * np.float32(true_temperature))
    assert found == pytest.approx(true_temperature, rel=0.05)


def test_an_annotator_that_is_always_right_stays_finite():
    found = temperature(np.full(100, 0.1, np.float32))
    assert found is not None
    # sigmoid(0.1 / T) = 101 / 102
    assert 0.1 / found == pytest.approx(np.log(101), rel=1e-3)


@pytest.mark.parametrize(
    "margins", [np.empty(0), np.ones(49), np.zeros(100), -np.ones(100)], ids=len
)
def test_no_temperature_without_evidence(margins):
    assert temperature(margins.astype(np.float32)) is None
