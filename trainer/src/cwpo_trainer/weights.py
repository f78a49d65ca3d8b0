"""The weight of each pair in the loss, from the columns of the weighted dataset."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cwpo.errors import DatasetError

Weighting = Literal[
    "confidence", "none", "top", "margin", "normalised_margin", "power", "entropy", "rank"
]
# The largest confidence below 1 that float32 can hold; a margin of about 17.
_SUREST = 1 - 2**-24


def confidence(confidences: ArrayLike) -> NDArray[np.float32]:
    """C of eq. 8 as the annotator wrote it, shape (n,), float32."""
    return checked(np.asarray(confidences, dtype=np.float32))


def none(pairs: int) -> NDArray[np.float32]:
    """1 for each pair: the unweighted loss, shape (pairs,), float32."""
    return np.ones(pairs, dtype=np.float32)


def top(confidences: ArrayLike, percent: float) -> NDArray[np.float32]:
    """1 for the given percentage of pairs with the highest confidence, 0 for the rest (Fig. 2).

    At least one pair is kept; of equally confident pairs the first ones are.
    """
    values = np.asarray(confidences, dtype=np.float32)
    kept = np.argsort(-values, kind="stable")[: max(1, round(len(values) * percent / 100))]
    weights = np.zeros_like(values)
    weights[kept] = 1
    return weights


def margin(confidences: ArrayLike) -> NDArray[np.float32]:
    """The margin of the scores, 2 artanh(C), the inverse of eq. 8; at most 17.

    Read back from C, so that calibrated confidence gives the calibrated margin.
    """
    values = np.minimum(np.asarray(confidences, dtype=np.float64), _SUREST)
    return checked((2 * np.arctanh(values)).astype(np.float32))


def normalised_margin(confidences: ArrayLike) -> NDArray[np.float32]:
    """The margin divided by the largest one, in [0, 1]."""
    margins = margin(confidences)
    return np.asarray(margins / margins.max(), dtype=np.float32)


def power(confidences: ArrayLike, exponent: float) -> NDArray[np.float32]:
    """C to the power of the exponent: above 1 it parts sure from unsure pairs more strongly."""
    return checked((np.asarray(confidences, np.float64) ** exponent).astype(np.float32))


def entropy(confidences: ArrayLike) -> NDArray[np.float32]:
    """1 - H(sigmoid(margin)), H the entropy in bits of the label that the annotator predicts."""
    sure = (1 + np.asarray(confidences, np.float64)) / 2
    unsure = 1 - sure
    bits = -sure * np.log2(sure) - unsure * np.log2(np.where(unsure > 0, unsure, 1))
    return checked(np.maximum(1 - bits, 0).astype(np.float32))


def rank(confidences: ArrayLike) -> NDArray[np.float32]:
    """The share of pairs that are at most as confident, in (0, 1]; ties share their mean rank."""
    values = np.asarray(confidences, dtype=np.float32)
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    mean_rank = last - (sizes - 1) / 2
    return np.asarray(mean_rank[group] / len(values), dtype=np.float32)


def normalise(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights divided by their mean over the dataset.

    Dividing by one constant keeps the form of eq. 7 and brings the gradient back to the size that
    the learning rate was chosen for, however unsure the annotator is on the whole.
    """
    return np.asarray(weights / weights.mean(dtype=np.float64), dtype=np.float32)


def checked(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same weights. Raises: DatasetError for one that no loss can be multiplied by."""
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise DatasetError(
            f"pair {bad[0] + 1} has the weight {weights[bad[0]]}; finite and >= 0 is wanted"
        )
    if not weights.any():
        raise DatasetError(
            "every weight is 0, so no pair would move the model: the annotator is sure of nothing"
        )
    return weights
