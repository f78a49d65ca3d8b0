"""Labels and confidences from raw scores, computed for many triplets at once, by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.types import Annotation, FailedAnnotation, ItemError, Preference
from cwpo_annotator.confidence import confidence, preferred
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.scores import Scores


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of some triplets, and the errors of those that have none.

    Args:
        named: id, and whether the prompt was cut, of each of the n labelled triplets.
        preferred: their labels.
        confidence: confidence of each label, shape (n,).
        calibrated_confidence: confidence at the checkpoint's temperature, shape (n,); None for a
            checkpoint without one.
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
        scores: Scores,
        temperature: float | None = None,
    ) -> Labels:
        """Combine the ids, the encoded items or their errors, and the scores of encoded pairs."""
        values = scores.values
        finite: NDArray[np.bool_] = np.isfinite(values[:, 0]) & np.isfinite(values[:, 1])
        if not finite.all():
            of_pairs = zip(finite, scores.too_large, strict=True)
            encoded = [
                _scored(item, *next(of_pairs)) if isinstance(item, EncodedPair) else item
                for item in encoded
            ]
            values = values[finite]
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
        a, b = values.T
        calibrated = None if temperature is None else confidence(a, b, temperature)
        return cls(named, preferred(a, b), confidence(a, b), calibrated, values, failed)

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


def no_score(too_large: bool) -> ItemError:
    """The error of an item that has no finite score.

    Args:
        too_large: whether the device's memory could not hold it.
    """
    return _OUT_OF_MEMORY if too_large else _NON_FINITE


def _scored(pair: EncodedPair, is_finite: bool, too_large: bool) -> EncodedPair | ItemError:
    return pair if is_finite else no_score(too_large)


_NON_FINITE = ItemError(code="non_finite_score", detail="the model's score is NaN or infinite")
_OUT_OF_MEMORY = ItemError(
    code="out_of_memory", detail="the device's memory cannot hold this item, even alone"
)
