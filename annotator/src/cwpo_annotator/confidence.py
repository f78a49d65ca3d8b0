"""Label and confidence from two raw scores: eq. 6 and 8 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import CwpoError
from cwpo.types import Preference


class NonFiniteScoreError(CwpoError):
    """A score is NaN or infinite, so there is no label."""


def confidence(
    score_a: NDArray[np.floating], score_b: NDArray[np.floating], temperature: float = 1.0
) -> NDArray[np.float32]:
    """Confidence of the label, eq. 8: 2 (sigmoid(margin) - 1/2) = tanh(|a - b| / 2T).

    Args:
        score_a, score_b: raw annotator scores (logits), shape (n,), any float dtype.
        temperature: T > 0; 1 as in the paper, or the checkpoint's calibration temperature.
    Returns: float32, shape (n,), in [0, 1]; 0 for a tie, and 1 by rounding for margins over 18.
    Raises: NonFiniteScoreError where a score is NaN or infinite.
    """
    a = np.asarray(score_a, dtype=np.float32)
    b = np.asarray(score_b, dtype=np.float32)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise NonFiniteScoreError("a score is NaN or infinite")
    result: NDArray[np.float32] = np.tanh(np.abs(a - b) / np.float32(2.0 * temperature))
    return result


def drift(confidences: NDArray[np.floating], quantiles: Sequence[float]) -> float:
    """First Wasserstein distance between the confidences and a distribution given by quantiles.

    A large value shows that the data differs from what the annotator was trained on. With Q(u) the
    quantile function of the confidences, shape (n,), and R(u) the given one, it is the integral of
    |Q(u) - R(u)| over u in [0, 1], by the trapezoid rule on an even grid (u = 0, 0.1, ..., 1 in
    annotator.json). Its unit is confidence: 0 for equal distributions, 0.1 if confidence has moved
    by 0.1 on average, at most 1.
    """
    gaps = np.abs(np.quantile(confidences, np.linspace(0, 1, len(quantiles))) - quantiles)
    return float((gaps[:-1] + gaps[1:]).mean() / 2)


def preferred(score_a: NDArray[np.floating], score_b: NDArray[np.floating]) -> list[Preference]:
    """The label of each pair, eq. 6: the response with the higher score, or a tie.

    Args:
        score_a, score_b: raw annotator scores (logits), shape (n,).
    """
    is_a, is_b = score_a > score_b, score_a < score_b
    # Indexing one array is several times as fast as choosing in Python.
    labels: list[Preference] = _LABELS[is_a + 2 * is_b].tolist()
    return labels


_LABELS = np.array(["tie", "a", "b"], dtype=object)
