"""Agreement of an annotator with human labels, and calibration of its confidence."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import DatasetError
from cwpo.types import ItemError, Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.confidence import confidence
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.data.conversations import beginnings
from cwpo_trainer.data.labelled import LabelledPair
from cwpo_trainer.data.left_out import left_out
from cwpo_trainer.evaluation.metrics import AnnotatorMetrics, ConfidenceBin, CoveragePoint, Share
from cwpo_trainer.run.chunks import chunks

_BINS = 10
_COVERAGES = np.arange(5, 101, 5) / 100
_SCORED_AT_ONCE = 1024


@dataclass(frozen=True)
class JudgedPairs:
    """Labelled pairs and what an annotator makes of them.

    margins: score of the chosen less that of the rejected response, float32, shape (n,).
    temperature: the annotator's, if it has one.
    failed: number of other pairs, which could not be scored.
    """

    pairs: Sequence[LabelledPair]
    margins: NDArray[np.float32]
    temperature: float | None
    failed: int

    @cached_property
    def confidences(self) -> NDArray[np.float32]:
        """Confidence of each label (eq. 8), shape (n,)."""
        return confidence(self.margins, np.zeros_like(self.margins))

    @cached_property
    def calibrated(self) -> NDArray[np.float32] | None:
        """Calibrated confidence of each label, shape (n,); None without a temperature."""
        if self.temperature is None:
            return None
        return confidence(self.margins, np.zeros_like(self.margins), self.temperature)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The places of the pairs, the least confident first.

        By margin, which also orders those whose confidence is rounded to 1.
        """
        return np.argsort(np.abs(self.margins), kind="stable")

    @cached_property
    def agreement(self) -> NDArray[np.float64]:
        """1 for a label that is right, 0 for a wrong one and a half for a tie, shape (n,)."""
        return np.where(self.margins == 0, 0.5, self.margins > 0)

    @cached_property
    def conversations(self) -> NDArray[np.int64]:
        """The number of each pair's conversation, shape (n,)."""
        keys = beginnings([pair.prompt for pair in self.pairs])
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return np.array([numbers[key] for key in keys], dtype=np.int64)

    def share(self, values: NDArray[np.generic], where: NDArray[np.generic]) -> Share:
        """The mean of `values` over some pairs, with its interval.

        Args:
            values: of each of those pairs; where: their places, or a mask of all pairs.
        """
        return Share.of(values, self.conversations[where])


def measure(annotator: Annotator, pairs: Sequence[LabelledPair]) -> AnnotatorMetrics:
    """Score all pairs and compare with the labels. Raises: DatasetError if none can be scored."""
    return measured(judge_pairs(annotator, pairs))


def judge_pairs(annotator: Annotator, pairs: Sequence[LabelledPair]) -> JudgedPairs:
    """Score all pairs, and tell the user which cannot be. Raises: DatasetError if none can."""
    scores, places, reasons = scores_of(annotator, [pair.triplet for pair in pairs])
    summary = left_out(reasons, len(pairs), limit=annotator.encoder.max_length, flag=None)
    if not places:
        raise DatasetError(summary)
    if reasons:
        print(summary, file=sys.stderr)
    chosen, rejected = scores.T
    return JudgedPairs(
        [pairs[at] for at in places],
        chosen - rejected,
        annotator.temperature,
        failed=len(pairs) - len(places),
    )


def scores_of(
    annotator: Annotator, triplets: Sequence[Triplet]
) -> tuple[NDArray[np.float32], list[int], Counter[str]]:
    """Scores of responses a and b, shape (n, 2), of the triplets that can be scored.

    Also returns: the places of these triplets, and the number of the others for each reason.
    """
    reasons: Counter[str] = Counter()
    parts = [np.empty((0, 2), np.float32)]
    places: list[int] = []
    for chunk in chunks(range(len(triplets)), _SCORED_AT_ONCE, work="score", unit="pairs"):
        encoded = annotator.encode([triplets[at] for at in chunk], "prompt_left")
        reasons.update(item.code for item in encoded if isinstance(item, ItemError))
        scorable = [item for item in encoded if isinstance(item, EncodedPair)]
        values = annotator.score_pairs(scorable).values
        is_finite: NDArray[np.bool_] = np.isfinite(values[:, 0]) & np.isfinite(values[:, 1])
        reasons["non_finite_score"] += int((~is_finite).sum())
        parts.append(values[is_finite])
        scored = [
            at for at, item in zip(chunk, encoded, strict=True) if isinstance(item, EncodedPair)
        ]
        places += [at for at, good in zip(scored, is_finite, strict=True) if good]
    return np.concatenate(parts), places, +reasons


def measured(judged: JudgedPairs) -> AnnotatorMetrics:
    """The figures of agreement and calibration."""
    confidences, agreement = judged.confidences, judged.agreement
    accuracy = Share.of(agreement, judged.conversations)
    bins = _bins(judged)
    calibrated = judged.calibrated
    return AnnotatorMetrics(
        pairs=len(agreement),
        failed=judged.failed,
        accuracy=accuracy.value,
        low=accuracy.low,
        high=accuracy.high,
        conversations=int(judged.conversations.max()) + 1,
        mean_confidence=float(confidences.mean()),
        ece=_calibration_error(bins, [item.mean_confidence for item in bins]),
        calibrated_ece=None
        if calibrated is None
        else _calibration_error(bins, [item.mean_calibrated_confidence or 0 for item in bins]),
        brier=_brier(confidences, agreement),
        calibrated_brier=None if calibrated is None else _brier(calibrated, agreement),
        confidence_quantiles=np.quantile(confidences, np.linspace(0, 1, 11)).tolist(),
        bins=bins,
        coverage=_coverage(judged),
    )


def _bins(judged: JudgedPairs) -> list[ConfidenceBin]:
    """Tenths of equal size, least confident first."""
    confidences, calibrated = judged.confidences, judged.calibrated
    bins = []
    for part in np.array_split(judged.order, min(_BINS, len(judged.order))):
        accuracy = judged.share(judged.agreement[part], part)
        bins.append(
            ConfidenceBin(
                pairs=len(part),
                lowest=float(confidences[part[0]]),
                highest=float(confidences[part[-1]]),
                mean_confidence=float(confidences[part].mean()),
                accuracy=accuracy.value,
                low=accuracy.low,
                high=accuracy.high,
                mean_calibrated_confidence=None
                if calibrated is None
                else float(calibrated[part].mean()),
            )
        )
    return bins


def _coverage(judged: JudgedPairs) -> list[CoveragePoint]:
    """Accuracy of the most confident pairs, in steps of a twentieth of all pairs."""
    order = judged.order[::-1]
    counts = dict.fromkeys(max(1, round(share * len(order))) for share in _COVERAGES)
    return [
        CoveragePoint(
            coverage=count / len(order),
            threshold=float(judged.confidences[order[count - 1]]),
            accuracy=judged.share(judged.agreement[order[:count]], order[:count]),
        )
        for count in counts
    ]


def _calibration_error(bins: Sequence[ConfidenceBin], confidences: Sequence[float]) -> float:
    """Mean gap between what a bin's mean confidence promises, (1 + C) / 2, and its accuracy."""
    gaps = [
        item.pairs * abs(item.accuracy - (1 + mean) / 2)
        for item, mean in zip(bins, confidences, strict=True)
    ]
    return sum(gaps) / sum(item.pairs for item in bins)


def _brier(confidences: NDArray[np.float32], agreement: NDArray[np.float64]) -> float:
    return float(np.square((1 + confidences.astype(np.float64)) / 2 - agreement).mean())
