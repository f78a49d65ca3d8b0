"""Confidence as the probability that a label is right, rather than as a weight.

By Bradley-Terry, the label of a pair with the margin D of scores is right with probability
sigmoid(D) = (1 + C) / 2, where C = tanh(D / 2) is its confidence (eq. 8). A loss for labels that
are wrong with probability epsilon then takes (1 - C) / 2 as that of each pair.

`SOFT_LABELS` lists what `cwpo align --confidence-as` offers besides `weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class SoftLabel:
    """What --loss dpo becomes when it takes the confidence of each pair as epsilon.

    Args:
        loss: of LOSSES, one with an epsilon.
        most: the largest epsilon of a pair; what would be more is this.
        meaning: in words, for the help of the flag and the docs.
    """

    loss: str
    most: float
    meaning: str


SOFT_LABELS = {
    "soft_label": SoftLabel(
        "cdpo", 0.5, "conservative DPO, on labels that are right with probability (1 + C) / 2"
    ),
    "robust": SoftLabel(
        "rdpo",
        # At 1/2 the loss divides by 0: a pair may count 10 times as much as a sure one.
        0.45,
        "robust DPO, eq. 11, with epsilon (1 - C) / 2, at most 0.45, for each pair",
    ),
}

if TYPE_CHECKING:
    ConfidenceUse = str
else:
    ConfidenceUse = Literal["weight", *SOFT_LABELS]


def epsilons(confidences: ArrayLike, *, most: float) -> NDArray[np.float32]:
    """The probability (1 - C) / 2 that each label is wrong, at most `most`; float32, same shape."""
    wrong = (1 - np.asarray(confidences, dtype=np.float64)) / 2
    return np.minimum(wrong, most).astype(np.float32)
