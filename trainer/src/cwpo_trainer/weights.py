"""The weight of each pair in the loss, from its confidence in the weighted dataset.

`WEIGHTS` lists what `cwpo align --weight` offers. Flags, their checks and help, and the table in
docs/training.md follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from cwpo.errors import DatasetError
from cwpo_trainer.constants import Constant

TOP_PERCENT = Constant(
    "percent",
    "top_percent",
    Annotated[float, Field(gt=0, le=100)],
    30,
    "Percentage of the pairs to keep",
)
EXPONENT = Constant(
    "exponent",
    "exponent",
    Annotated[float, Field(gt=0)],
    2,
    "Power that the confidence is raised to",
)

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


def certified(labels: ArrayLike) -> NDArray[np.float32]:
    """1 for each certified label, 0 for the rest.

    Args:
        labels: whether each is certified, bool, shape (n,).
    """
    return np.asarray(labels, dtype=np.float32)


def margin(confidences: ArrayLike) -> NDArray[np.float32]:
    """The margin of the scores, 2 artanh(C), the inverse of eq. 8; at most 17.

    Read back from C, so that calibrated confidence gives the calibrated margin.
    """
    values = np.minimum(np.asarray(confidences, dtype=np.float64), _SUREST)
    return checked((2 * np.arctanh(values)).astype(np.float32))


def normalised_margin(confidences: ArrayLike) -> NDArray[np.float32]:
    """The margin divided by the largest one, in [0, 1].

    The two differ by a constant factor only, which AdamW cancels: see `normalise`.
    """
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


@dataclass(frozen=True)
class Weight:
    """A weight of `cwpo align`.

    Args:
        function: from confidences, shape (pairs,), to weights, float32 of the same shape.
        formula: in LaTeX, for the docs.
        meaning: in words, for the help of the flag and the docs.
        is_the_papers: whether the paper defines it.
        reads_confidence: whether pairs of different confidence have different weights.
        reads_certified: the function takes the column certified, rather than confidences.
        selects: whether a pair of weight 0 is left out; the others are not normalised then.
        compares: whether it depends on the other pairs of the dataset.
    """

    function: Callable[..., NDArray[np.float32]]
    formula: str
    meaning: str
    constants: tuple[Constant, ...] = ()
    is_the_papers: bool = False
    reads_confidence: bool = True
    reads_certified: bool = False
    selects: bool = False
    compares: bool = False


WEIGHTS = {
    "confidence": Weight(confidence, "C", "C itself, as in eq. 8", is_the_papers=True),
    "none": Weight(
        lambda confidences: none(len(confidences)),
        "1",
        "1 for each pair, the unweighted loss",
        is_the_papers=True,
        reads_confidence=False,
    ),
    "top": Weight(
        top,
        r"1 \text{ or } 0",
        "1 for the most confident pairs; the others are left out",
        (TOP_PERCENT,),
        is_the_papers=True,
        selects=True,
        compares=True,
    ),
    "certified": Weight(
        certified,
        r"1 \text{ or } 0",
        "1 for the labels that a certificate of the annotator is of; the others are left out",
        reads_confidence=False,
        reads_certified=True,
        selects=True,
    ),
    "margin": Weight(margin, r"\Delta", "the margin of the scores, 2 artanh C"),
    "normalised_margin": Weight(
        normalised_margin,
        r"\Delta / \max \Delta",
        "the margin, divided by the largest in the dataset; under AdamW the same as margin, up to "
        "the clipping of gradients",
        compares=True,
    ),
    "power": Weight(power, "C^k", "C to the power k, the exponent", (EXPONENT,)),
    "entropy": Weight(
        entropy,
        r"1 - H_2(\sigma(\Delta))",
        "1 minus the entropy, in bits, of the predicted label",
    ),
    "rank": Weight(
        rank,
        r"\mathrm{rank}(C) / n",
        "the share of the pairs that are at most as confident",
        compares=True,
    ),
}

if TYPE_CHECKING:
    WeightName = str
else:
    WeightName = Literal[*WEIGHTS]


def per_prompt(weights: ArrayLike, prompt_pairs: ArrayLike) -> NDArray[np.float32]:
    """The weights divided by the numbers of pairs of the same prompt, shape (pairs,), float32.

    K responses to a prompt give up to K (K - 1) / 2 pairs, which say less than as many pairs of
    different prompts would: together they have the mean weight of one pair.
    """
    return np.asarray(np.asarray(weights) / np.asarray(prompt_pairs), dtype=np.float32)


def normalise(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights divided by their mean over the dataset.

    Dividing by one constant keeps the form of eq. 7. AdamW divides a gradient by its own size, so
    its steps stay the same; the losses that are shown do not, nor does what the clipping of
    gradients cuts off.
    """
    return np.asarray(weights / weights.mean(dtype=np.float64), dtype=np.float32)


def checked(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same weights. Raises: DatasetError for one that no loss can be multiplied by."""
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise DatasetError(
            f"pair {bad[0] + 1} has the weight {weights[bad[0]]}; a weight is finite and at least 0"
        )
    if not weights.any():
        raise DatasetError("every weight is 0, so training would change nothing")
    return weights
