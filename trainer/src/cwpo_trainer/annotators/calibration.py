"""The temperature at which an annotator is as often right as its confidence says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEWEST_PAIRS = 50
_NEWTON_STEPS = 50


def temperature(margins: NDArray[np.float32]) -> float | None:
    """T for which sigmoid(margin / T) fits held-out human labels best.

    Maximum likelihood in 1/T, with Platt's targets (n + 1) / (n + 2) in place of 1, so that an
    annotator that is always right on n pairs still gets a finite confidence.

    Args:
        margins: score of the chosen less that of the rejected response, shape (n,).
    Returns: T > 0; None for under 50 pairs, or where the scores do not rank better than chance.
    """
    m = margins.astype(np.float64)
    scale = float(np.abs(m).mean()) if m.size else 0.0
    if m.size < FEWEST_PAIRS or scale == 0:
        return None
    m /= scale
    target = (m.size + 1) / (m.size + 2)
    inverse = 0.0
    for _ in range(_NEWTON_STEPS):
        right = 1 / (1 + np.exp(-inverse * m))
        slope = ((target - right) * m).mean()
        curvature = (right * (1 - right) * m * m).mean()
        # A step bounded in size cannot overshoot into where the curvature vanishes.
        inverse += float(np.clip(slope / (curvature + 1e-12), -1.0, 1.0))
    return scale / inverse if inverse > 1e-6 else None
