"""Whether labels follow what tells nothing of quality: length, position, source."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cwpo_trainer.evaluation.agreement import JudgedPairs
from cwpo_trainer.evaluation.metrics import Bias, Share


def length_bias(judged: JudgedPairs) -> Bias | None:
    """Of the longer response, in characters; None if no two lengths differ."""
    longer = np.array([len(pair.chosen) - len(pair.rejected) for pair in judged.pairs])
    return _bias(judged, longer > 0, longer != 0)


def position_bias(judged: JudgedPairs) -> Bias | None:
    """Of the response that stands first in its row; None if no row has an order.

    An annotator reads responses apart, or in both orders. If it prefers the first, so do its data.
    """
    first = np.array([bool(pair.chosen_first) for pair in judged.pairs])
    known = np.array([pair.chosen_first is not None for pair in judged.pairs])
    return _bias(judged, first, known)


def accuracy_by_source(judged: JudgedPairs) -> dict[str, Share]:
    """Accuracy on the pairs of each source, the least accurate first; of those that name one."""
    names = np.array([pair.source or "" for pair in judged.pairs])
    shares = {}
    for name in sorted({*names.tolist()} - {""}):
        of_source = names == name
        shares[name] = judged.share(judged.agreement[of_source], of_source)
    return dict(sorted(shares.items(), key=lambda item: item[1].value))


def _bias(judged: JudgedPairs, people: NDArray[np.bool_], known: NDArray[np.bool_]) -> Bias | None:
    """Of a response.

    Args:
        people: whether people prefer it, shape (n,).
        known: whether the pair has such a response, shape (n,).
    """
    if not known.any():
        return None
    agreement = judged.agreement
    prefers = np.where(people, agreement, 1 - agreement)
    return Bias(
        annotator=judged.share(prefers[known], known),
        people=judged.share(people[known], known),
        accuracy_for=_accuracy(judged, known & people),
        accuracy_against=_accuracy(judged, known & ~people),
    )


def _accuracy(judged: JudgedPairs, where: NDArray[np.bool_]) -> Share | None:
    return judged.share(judged.agreement[where], where) if where.any() else None
