"""Labels with confidence from raw scores: of many triplets at once, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.types import Annotation, FailedAnnotation, ItemError, Preference
from cwpo_annotator.backends.base import EncodedPair, is_out_of_memory
from cwpo_annotator.confidence import confidence, preferred


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of some triplets, and what is wrong with those that have none.

    Args:
        named: id, and whether the prompt was cut, of each of the n labelled triplets.
        preferred: their labels.
        confidence: theirs, shape (n,).
        calibrated_confidence: the same at the checkpoint's temperature; None without one.
        scores: raw scores of a and b, shape (n, 2), all finite.
        failed: position, id and error of every other triplet, in order.
    """

    named: Sequence[tuple[str, bool]]
    preferred: Sequence[Preference]
    confidence: NDArray[np.float32]
    calibrated_confidence: NDArray[np.float32] | None
    scores: NDArray[np.float32]
    failed: Sequence[tuple[int, str, ItemError]]

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        encoded: Sequence[EncodedPair | ItemError],
        scores: NDArray[np.float32],
        temperature: float | None = None,
    ) -> Labels:
        """Put ids, what was encoded, and scores, shape (pairs among encoded, 2), together."""
        finite = np.isfinite(scores).all(axis=1)
        if not finite.all():
            of_pairs = iter(scores)
            encoded = [
                _scored(item, next(of_pairs)) if isinstance(item, EncodedPair) else item
                for item in encoded
            ]
            scores = scores[finite]
        named = [
            (item_id, item.truncated)
            for item_id, item in zip(ids, encoded, strict=True)
            if isinstance(item, EncodedPair)
        ]
        failed: list[tuple[int, str, ItemError]] = []
        if len(named) < len(encoded):
            failed = [
                (at, ids[at], item)
                for at, item in enumerate(encoded)
                if not isinstance(item, EncodedPair)
            ]
        a, b = scores.T
        calibrated = None if temperature is None else confidence(a, b, temperature)
        return cls(named, preferred(a, b), confidence(a, b), calibrated, scores, failed)

    def rows(self) -> list[dict[str, Any]]:
        """The fields of an Annotation or FailedAnnotation for each triplet, in input order."""
        a, b = self.scores.T.tolist()
        columns = (self.preferred, self.confidence.tolist(), a, b)
        rows: list[dict[str, Any]] = [
            {
                "id": item_id,
                "preferred": label,
                "confidence": certainty,
                "score_a": score_a,
                "score_b": score_b,
                "truncated": truncated,
            }
            for (item_id, truncated), label, certainty, score_a, score_b in zip(
                self.named, *columns, strict=True
            )
        ]
        if self.calibrated_confidence is not None:
            for row, certainty in zip(rows, self.calibrated_confidence.tolist(), strict=True):
                row["calibrated_confidence"] = certainty
        for at, item_id, error in self.failed:
            rows.insert(at, {"id": item_id, "error": error})
        return rows

    def annotations(self) -> list[Annotation | FailedAnnotation]:
        """The rows as models."""
        return [
            FailedAnnotation(**row) if "error" in row else Annotation(**row) for row in self.rows()
        ]


def no_score(scores: NDArray[np.float32]) -> ItemError:
    """Why an item's scores, shape (1,) or (2,), are not finite."""
    return _OUT_OF_MEMORY if is_out_of_memory(scores) else _NON_FINITE


def _scored(pair: EncodedPair, scores: NDArray[np.float32]) -> EncodedPair | ItemError:
    return pair if np.isfinite(scores).all() else no_score(scores)


_NON_FINITE = ItemError(code="non_finite_score", detail="the model's score is NaN or infinite")
_OUT_OF_MEMORY = ItemError(
    code="out_of_memory", detail="the device's memory cannot hold this item, even alone"
)
