"""How other data differ from the labelled pairs (App. J.5, J.7).

What is scored for that also tells which pairs of the other data people should label next.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cwpo.errors import DatasetError
from cwpo.reviews.pairs import ReviewPair
from cwpo.reviews.selection import pool_size, spread
from cwpo.types import Preference, Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.confidence import confidence, drift, preferred
from cwpo_trainer.data.conversations import one_of_each
from cwpo_trainer.data.left_out import left_out
from cwpo_trainer.evaluation.agreement import scores_of
from cwpo_trainer.evaluation.embeddings import embeddings_of
from cwpo_trainer.evaluation.metrics import EmbeddingShift, Shift

# The Kolmogorov distribution's quantile at 95 %.
_KOLMOGOROV = 1.358
_DECILES = np.linspace(0, 1, 11)


@dataclass(frozen=True, slots=True)
class ScoredTriplets:
    """Triplets of a file that could be scored, one of each conversation.

    data: name of the file; rows: their numbers in it, from 0; scores: of responses a and b, shape
    (n, 2).
    """

    data: Path
    rows: Sequence[int]
    triplets: Sequence[Triplet]
    scores: NDArray[np.float32]

    @classmethod
    def of(
        cls, annotator: Annotator, triplets: Sequence[Triplet], data: Path, *, seed: int
    ) -> ScoredTriplets:
        """Score one triplet of each conversation. Raises: DatasetError if none can be scored."""
        rows = one_of_each([item.prompt for item in triplets], seed=seed)
        scores, places, reasons = scores_of(annotator, [triplets[row] for row in rows])
        if reasons:
            summary = left_out(reasons, len(rows), limit=annotator.encoder.max_length, flag=None)
            if not places:
                raise DatasetError(f"{data}: {summary}")
            print(f"{data}: {summary}", file=sys.stderr)
        scored = [rows[place] for place in places]
        return cls(data, scored, [triplets[row] for row in scored], scores)

    @property
    def confidences(self) -> NDArray[np.floating]:
        """Shape (n,)."""
        return confidence(*self.scores.T)

    def to_label(self, most: int, annotator: Annotator) -> list[ReviewPair]:
        """Up to `most` of the least confident ones that the annotator finds unlike each other."""
        confidences, labels = self.confidences, preferred(*self.scores.T)
        unsure = np.argsort(confidences, kind="stable")[: pool_size(most)]
        pairs = [self._pair(at, labels[at], confidences[at]) for at in unsure]
        embeddings = embeddings_of(annotator, [self.triplets[at] for at in unsure])
        return spread(pairs, embeddings, most)

    def _pair(self, at: int, label: Preference, confidence_: float) -> ReviewPair:
        triplet = self.triplets[at]
        return ReviewPair(
            **triplet.model_dump(exclude={"id"}),
            id=triplet.id or str(self.rows[at]),
            annotator=label,
            confidence=float(confidence_),
        )


def shift(
    confidences: NDArray[np.float32],
    others: ScoredTriplets,
    *,
    threshold: float | None,
    embeddings: EmbeddingShift | None,
) -> Shift:
    """Compare the confidences with those on triplets of another file.

    Args:
        confidences: on labelled pairs, one of each conversation, shape (n,).
        threshold: that of the certificate, if there is one.
        embeddings: how their texts differ.
    """
    found = others.confidences
    return Shift(
        data=str(others.data),
        triplets=len(found),
        mean_confidence=float(found.mean()),
        ks=kolmogorov_smirnov(confidences, found),
        chance=_KOLMOGOROV * math.sqrt(1 / len(confidences) + 1 / len(found)),
        distance=drift(found, np.quantile(confidences, _DECILES).tolist()),
        certified=None if threshold is None else float((found > threshold).mean()),
        embeddings=embeddings,
    )


def kolmogorov_smirnov(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """The largest difference of the distribution functions of two samples, from 0 to 1."""
    everywhere = np.concatenate([left, right])
    below = [
        np.searchsorted(np.sort(sample), everywhere, side="right") / len(sample)
        for sample in (left, right)
    ]
    return float(np.abs(below[0] - below[1]).max())
