"""How confidences on other data differ from those on the labelled pairs (App. J.5, J.7)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import DatasetError
from cwpo.types import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.confidence import confidence, drift
from cwpo_trainer.data.conversations import one_of_each
from cwpo_trainer.data.left_out import left_out
from cwpo_trainer.evaluation.agreement import scores_of
from cwpo_trainer.evaluation.metrics import Shift

# The Kolmogorov distribution's quantile at 95 %.
_KOLMOGOROV = 1.358
_DECILES = np.linspace(0, 1, 11)


def shift(
    annotator: Annotator,
    confidences: NDArray[np.float32],
    triplets: Sequence[Triplet],
    data: Path,
    *,
    threshold: float | None,
    seed: int,
) -> Shift:
    """Compare the confidences with those on triplets of another file.

    Args:
        confidences: on labelled pairs, one of each conversation, shape (n,).
        triplets: of the other file; one of each conversation is compared.
        data: name of the other file.
        threshold: that of the certificate, if there is one.
    Raises: DatasetError if none of the triplets can be scored.
    """
    chosen = [triplets[at] for at in one_of_each([item.prompt for item in triplets], seed=seed)]
    scores, places, reasons = scores_of(annotator, chosen)
    if reasons:
        summary = left_out(reasons, len(chosen), limit=annotator.encoder.max_length, flag=None)
        if not places:
            raise DatasetError(f"{data}: {summary}")
        print(f"{data}: {summary}", file=sys.stderr)
    others = confidence(*scores.T)
    return Shift(
        data=str(data),
        triplets=len(others),
        mean_confidence=float(others.mean()),
        ks=kolmogorov_smirnov(confidences, others),
        chance=_KOLMOGOROV * math.sqrt(1 / len(confidences) + 1 / len(others)),
        distance=drift(others, np.quantile(confidences, _DECILES).tolist()),
        certified=None if threshold is None else float((others > threshold).mean()),
    )


def kolmogorov_smirnov(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """The largest difference of the distribution functions of two samples, from 0 to 1."""
    everywhere = np.concatenate([left, right])
    below = [
        np.searchsorted(np.sort(sample), everywhere, side="right") / len(sample)
        for sample in (left, right)
    ]
    return float(np.abs(below[0] - below[1]).max())
