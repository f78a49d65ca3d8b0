"""How well an annotator agrees with people, and how far its confidence can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import DatasetError
from cwpo.types import ItemError, Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.confidence import confidence
from cwpo_trainer import runtime
from cwpo_trainer.data import LabelledPair, read_pairs
from cwpo_trainer.evaluation.metrics import AnnotatorMetrics, ConfidenceBin
from cwpo_trainer.record import new_output

if TYPE_CHECKING:
    from cwpo_trainer.commands import EvaluateAnnotator

_BINS = 10


def run(settings: EvaluateAnnotator) -> None:
    """Measure and write the output folder."""
    pairs = read_pairs(settings.data)
    recorded = settings.model_dump(mode="json")
    with new_output("evaluate-annotator", settings.output, recorded) as output:
        runtime.prepare(seed=0, threads=settings.threads)
        metrics = measure(Annotator.load(settings.annotator, dtype=settings.dtype), pairs)
        output.results |= metrics.model_dump(mode="json")
    print(metrics.summary)


def measure(annotator: Annotator, pairs: Sequence[LabelledPair]) -> AnnotatorMetrics:
    """Score all pairs and compare. Raises: DatasetError when none can be scored."""
    margins = margins_of(annotator, pairs)
    if not margins.size:
        raise DatasetError("none of the pairs can be scored: all are too long for the annotator")
    zeros = np.zeros_like(margins)
    confidences = confidence(margins, zeros)
    agreement = np.where(margins == 0, 0.5, margins > 0)
    bins = _bins(confidences, agreement)
    calibrated_ece = None
    if annotator.temperature is not None:
        calibrated = confidence(margins, zeros, annotator.temperature)
        calibrated_ece = _calibration_error(_bins(calibrated, agreement))
    return AnnotatorMetrics(
        pairs=len(margins),
        failed=len(pairs) - len(margins),
        accuracy=float(agreement.mean()),
        mean_confidence=float(confidences.mean()),
        ece=_calibration_error(bins),
        calibrated_ece=calibrated_ece,
        confidence_quantiles=np.quantile(confidences, np.linspace(0, 1, 11)).tolist(),
        bins=bins,
    )


def margins_of(annotator: Annotator, pairs: Sequence[LabelledPair]) -> NDArray[np.float32]:
    """Score of the chosen less that of the rejected response, shape (scorable pairs,)."""
    triplets = [
        Triplet(id=pair.id, prompt=pair.prompt, response_a=pair.chosen, response_b=pair.rejected)
        for pair in pairs
    ]
    encoded = annotator.encode(triplets, "prompt_left")
    scorable = [item for item in encoded if not isinstance(item, ItemError)]
    scores = annotator.score_pairs(scorable)
    return scores[np.isfinite(scores).all(axis=1)] @ np.array([1, -1], np.float32)


def _bins(confidences: NDArray[np.float32], agreement: NDArray[np.float64]) -> list[ConfidenceBin]:
    """Tenths of equal size, least confident first."""
    order = np.argsort(confidences, kind="stable")
    return [
        ConfidenceBin(
            pairs=len(part),
            lowest=float(confidences[part[0]]),
            highest=float(confidences[part[-1]]),
            mean_confidence=float(confidences[part].mean()),
            accuracy=float(agreement[part].mean()),
        )
        for part in np.array_split(order, min(_BINS, len(order)))
    ]


def _calibration_error(bins: Sequence[ConfidenceBin]) -> float:
    """Mean gap between what a bin's confidence promises, (1 + C) / 2, and its accuracy."""
    gaps = [item.pairs * abs(item.accuracy - (1 + item.mean_confidence) / 2) for item in bins]
    return sum(gaps) / sum(item.pairs for item in bins)
