"""The weight of each pair in the loss, from the columns of the weighted dataset."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cwpo.errors import DatasetError

Weighting = Literal["confidence", "none"]


def confidence(confidences: ArrayLike) -> NDArray[np.float32]:
    """C of eq. 8 as the annotator wrote it, shape (n,), float32."""
    return checked(np.asarray(confidences, dtype=np.float32))


def none(pairs: int) -> NDArray[np.float32]:
    """1 for each pair: the unweighted loss, shape (pairs,), float32."""
    return np.ones(pairs, dtype=np.float32)


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
