"""Rankings from raw scores, computed for many items at once, by column."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.types import ItemError
from cwpo_annotator.confidence import confidence
from cwpo_annotator.encoded import EncodedResponses, EncodedText
from cwpo_annotator.labels import no_score
from cwpo_annotator.scores import Scores


def texts_of(encoded: Sequence[EncodedResponses | ItemError]) -> list[EncodedText]:
    """The texts to score, item after item: those of distinct responses."""
    items = [item for item in encoded if isinstance(item, EncodedResponses)]
    return [text for item in items for text in item.texts]


def ranked(
    ids: Sequence[str],
    encoded: Sequence[EncodedResponses | ItemError],
    scores: Scores,
    temperature: float | None = None,
) -> list[dict[str, Any]]:
    """The fields of a Ranking or FailedAnnotation for each item, in input order.

    Equal scores keep the order of their responses, with confidence 0. An item with a score that is
    not finite is an error.

    Args:
        ids: of the items.
        encoded: the encoded items or their errors.
        scores: of `texts_of` the items.
        temperature: that of the checkpoint; None for one without.
    """
    items = [item for item in encoded if isinstance(item, EncodedResponses)]
    texts = accumulate((len(item.texts) for item in items), initial=0)
    counts = [len(item.places) for item in items]
    # One start more than items: where the next one would begin.
    text = [first + at for item, first in zip(items, texts, strict=False) for at in item.places]
    values, too_large = scores.values[text], scores.too_large[text]
    finite = np.isfinite(values)
    known = np.where(finite, values, np.float32(0))
    # Stable, and by item first.
    order = np.lexsort((-known, np.repeat(np.arange(len(items)), counts)))
    sure = _neighbours(known[order])
    calibrated = None if temperature is None else _neighbours(known[order], temperature)
    rows: list[dict[str, Any]] = []
    spans = iter(pairwise(accumulate(counts, initial=0)))
    for item_id, item in zip(ids, encoded, strict=True):
        if isinstance(item, ItemError):
            rows.append({"id": item_id, "error": item})
            continue
        first, end = next(spans)
        if not finite[first:end].all():
            rows.append({"id": item_id, "error": no_score(bool(too_large[first:end].any()))})
            continue
        row = {
            "id": item_id,
            "order": (order[first:end] - first).tolist(),
            "scores": values[first:end].tolist(),
            "confidence": sure[first : end - 1],
            "truncated": item.truncated,
        }
        if calibrated is not None:
            row["calibrated_confidence"] = calibrated[first : end - 1]
        rows.append(row)
    return rows


def _neighbours(ordered: NDArray[np.float32], temperature: float = 1.0) -> list[float]:
    """The confidence of each response against the next one, those of two items included."""
    values: list[float] = confidence(ordered[:-1], ordered[1:], temperature).tolist()
    return values
