"""Temperature calibration: how far an annotator's margins overstate or understate what it knows."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_BISECTIONS = 80


def fit_temperature(margins: ArrayLike) -> float | None:
    """The temperature T under which sigmoid(margin / T) best predicts the labels.

    Maximises the Bradley-Terry likelihood (eq. 4), which is concave in 1 / T. As in Platt scaling,
    labels are taken to be right with probability (n + 1) / (n + 2), so that T stays above 0 even if
    all of a few margins happen to be positive.

    Args:
        margins: score of the chosen less that of the rejected response, on labelled pairs that the
            annotator was not trained on, shape (n,).
    Returns: T > 0; None if the annotator is no better than chance, so that no T can help.
    """
    values = np.asarray(margins, dtype=np.float64)
    scale = float(np.abs(values).mean()) if values.size else 0.0
    if scale == 0 or values.sum() <= 0:
        return None
    values = values / scale
    right = (len(values) + 1) / (len(values) + 2)

    def slope(inverse: float) -> float:
        predicted = (1 + np.tanh(inverse * values / 2)) / 2
        return float(values @ (predicted - right))

    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return scale / high


def likelihood_loss(margins: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of -log sigmoid(margin / T), eq. 5, over margins of shape (n,)."""
    return float(np.logaddexp(0, -np.asarray(margins, dtype=np.float64) / temperature).mean())
