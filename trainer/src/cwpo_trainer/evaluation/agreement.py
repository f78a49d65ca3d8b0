"""Agreement of an annotator with human labels, and calibration of its confidence."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import DatasetError
from cwpo.types import ItemError
from cwpo_annotator import Annotator
from cwpo_annotator.confidence import confidence
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.data.labelled import LabelledPair, read_pairs
from cwpo_trainer.data.left_out import left_out
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.evaluation.metrics import AnnotatorMetrics, ConfidenceBin
from cwpo_trainer.run import process
from cwpo_trainer.run.chunks import chunks
from cwpo_trainer.run.folder import new_run_folder
from cwpo_trainer.settings.evaluation import AnnotatorEvaluation

_BINS = 10
_SCORED_AT_ONCE = 1024


def evaluate_annotator(settings: AnnotatorEvaluation) -> None:
    """Measure the annotator on labelled pairs and write the output folder.

    Raises: DatasetError or CheckpointError, before any scoring.
    """
    unused = UnusedRows(settings.max_rejected_share)
    pairs = read_pairs(settings.data, unused)
    recorded = settings.model_dump(mode="json")
    with new_run_folder("evaluate-annotator", settings.output, recorded) as output:
        unused.report(output)
        process.prepare(seed=0, threads=settings.threads)
        metrics = measure(Annotator.load(settings.annotator, dtype=settings.dtype), pairs)
        output.results |= metrics.model_dump(mode="json")
    print(metrics.summary)


def measure(annotator: Annotator, pairs: Sequence[LabelledPair]) -> AnnotatorMetrics:
    """Score all pairs and compare with the labels. Raises: DatasetError if none can be scored."""
    margins, reasons = margins_of(annotator, pairs)
    limit = annotator.encoder.max_length
    summary = left_out(reasons, len(pairs), limit=limit, flag=None)
    if not margins.size:
        raise DatasetError(summary)
    if reasons:
        print(summary, file=sys.stderr)
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


def margins_of(
    annotator: Annotator, pairs: Sequence[LabelledPair]
) -> tuple[NDArray[np.float32], Counter[str]]:
    """Score of the chosen minus that of the rejected response, shape (scorable pairs,).

    Also returns: number of pairs that cannot be scored, for each reason.
    """
    reasons: Counter[str] = Counter()
    parts = [np.empty((0, 2), np.float32)]
    for chunk in chunks(pairs, _SCORED_AT_ONCE, work="score", unit="pairs"):
        encoded = annotator.encode([pair.triplet for pair in chunk], "prompt_left")
        reasons.update(item.code for item in encoded if isinstance(item, ItemError))
        scorable = [item for item in encoded if isinstance(item, EncodedPair)]
        parts.append(annotator.score_pairs(scorable).values)
    scores = np.concatenate(parts)
    is_finite = np.isfinite(scores).all(axis=1)
    if not is_finite.all():
        reasons["non_finite_score"] += int((~is_finite).sum())
    chosen, rejected = scores[is_finite].T
    margins: NDArray[np.float32] = chosen - rejected
    return margins, reasons


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
