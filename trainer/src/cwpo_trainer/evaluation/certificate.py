"""The certificate of an annotator: above which confidence its labels can be trusted.

With r(t) the share of wrong labels among those with a confidence above t, it is a threshold t of
which r(t) <= max_error holds with probability 1 - delta over the labelled pairs that it was found
on. Nothing is assumed of r, nor of what a confidence means.

**One threshold.** Let t be the confidence of the pair in place k + 1, the most confident first. The
k pairs before it are then independent draws from all pairs above t, so their errors are binomial
with k and r(t). t passes if the one-sided Clopper-Pearson bound of r(t) is at most max_error: if
P(B <= errors) <= delta for a binomial B of k and max_error. If r(t) > max_error, t passes with
probability delta at most.

**The sequence.** The places k follow from the number of pairs alone, and the thresholds are tested
from the most confident down, until one fails. The last one that passed is bad (r > max_error) only
if the first bad one passed too, so no correction for their number is needed (fixed-sequence
testing; Angelopoulos et al. 2021, Learn then Test, arXiv 2110.01052).

**Which threshold is the first bad one** depends on the confidences, yet costs nothing. If no two
are equal, r is continuous, and r = max_error wherever it crosses max_error. Between two crossings
the mean error is thus max_error exactly, and from the last one down to a bad threshold it is more.
Which threshold is the first bad one follows from how many pairs lie between crossings; given these
numbers, the errors above it are at least those of a binomial of k and max_error, in distribution.
Pairs of equal confidence stay together; then r jumps, and the same holds if r falls as t rises.
(Given all confidences, errors are of unequal probability. Their number spreads less than a binomial
of the mean probability, Hoeffding 1956, so the bound also holds for that mean.)

**What it rests on.** The pairs are independent of each other and of everything that the annotator
was trained and calibrated on, hence one pair of each conversation; and the data that it labels
later is exchangeable with them. On other data the certificate says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cwpo.types import Certificate

# No threshold keeps a smaller share of the pairs, and each keeps so many times as many as the last.
_LOWEST_COVERAGE = 0.05
_GROWTH = 1.1
_MOST_LABELS = 10_000_000
_BISECTIONS = 60


def certify(
    confidences: ArrayLike, correct: ArrayLike, *, max_error: float, delta: float
) -> Certificate | None:
    """The certificate that the labels allow; None if they allow none.

    Args:
        confidences: of independent labelled pairs, in [0, 1], shape (n,).
        correct: whether the annotator's label is right, bool, shape (n,); a tie is not.
        max_error: largest share of wrong labels, in (0, 1/2).
        delta: largest probability that the certificate is wrong, in (0, 1/2).
    """
    values = np.asarray(confidences)
    order = np.argsort(-values, kind="stable")
    wrong = ~np.asarray(correct, dtype=np.bool_)[order]
    errors_before = np.concatenate([[0], np.cumsum(wrong)])
    found = None
    for threshold, pairs in _sequence(values[order], max_error, delta):
        errors = int(errors_before[pairs])
        if errors > most_errors(pairs, max_error, delta):
            break
        found = Certificate(
            max_error=max_error,
            delta=delta,
            threshold=threshold,
            coverage=pairs / len(values),
            pairs=pairs,
            errors=errors,
        )
    return found


def labels_needed(
    confidences: ArrayLike, correct: ArrayLike, *, max_error: float, delta: float
) -> int | None:
    """About how many independent labels a certificate would take, by the errors on these.

    The least number with which some threshold passes if as large a share of the labels above it is
    wrong as is now. None if no threshold has a share below max_error: then more labels of this kind
    do not help, but a better annotator.

    Args: as for `certify`.
    """
    values = np.asarray(confidences)
    order = np.argsort(-values, kind="stable")
    errors_before = np.cumsum(~np.asarray(correct, dtype=np.bool_)[order])
    needed = []
    for pairs in _places(max(1, math.ceil(_LOWEST_COVERAGE * len(values))), len(values)):
        share = float(errors_before[pairs - 1]) / pairs
        above = _pairs_needed(share, max_error, delta)
        if above is not None:
            needed.append(math.ceil(above * len(values) / pairs))
    return min(needed, default=None)


@lru_cache(maxsize=4096)
def most_errors(pairs: int, max_error: float, delta: float) -> int:
    """The most errors in `pairs` labels with which a threshold passes; -1 if not even 0 do.

    0 do from ln(delta) / ln(1 - max_error) pairs on.
    """
    # delta is below a half, and the median of the binomial is at least the lower of these.
    largest = min(pairs, math.floor(pairs * max_error) + 1)
    passed = _log_distribution(largest, pairs, max_error) <= math.log(delta)
    return int(np.count_nonzero(passed)) - 1


def upper_bound(errors: int, pairs: int, delta: float) -> float:
    """The one-sided Clopper-Pearson bound of a share, of which `errors` in `pairs` are seen.

    The share is below it with probability 1 - delta at least.
    """
    if errors == pairs:
        return 1.0
    low, high = errors / pairs, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        passes = _log_distribution(errors, pairs, middle)[-1] > math.log(delta)
        low, high = (middle, high) if passes else (low, middle)
    return high


def _log_distribution(largest: int, pairs: int, share: float) -> NDArray[np.float64]:
    """log P(B <= i) of a binomial B of `pairs` and `share`, for i = 0, ..., largest."""
    steps = np.arange(1, largest + 1)
    ratios = np.log((pairs - steps + 1) / steps) + math.log(share) - math.log1p(-share)
    logs = pairs * math.log1p(-share) + np.concatenate([[0.0], np.cumsum(ratios)])
    result: NDArray[np.float64] = np.logaddexp.accumulate(logs)
    return result


def _sequence(
    descending: NDArray[np.floating], max_error: float, delta: float
) -> Iterator[tuple[float, int]]:
    """The thresholds in the order of their tests, and how many confidences are above each.

    Args:
        descending: the confidences, the largest first.
    """
    total = len(descending)
    first = max(_first_place(max_error, delta), math.ceil(_LOWEST_COVERAGE * total))
    tested = 0
    for place in _places(first, total):
        # Ties, of confidence 0, are above no threshold: they have no label.
        threshold = float(descending[place]) if place < total else 0.0
        above = int(np.searchsorted(-descending, -threshold, side="left"))
        # Of a group of equal confidences, all are above or none.
        if above > tested and (above >= first or place == total):
            tested = above
            yield threshold, above


def _places(first: int, total: int) -> Iterator[int]:
    """Numbers of pairs from `first` on, each a tenth larger than the last, and then all pairs."""
    place = first
    while place < total:
        yield place
        place = math.ceil(_GROWTH * place)
    if total:
        yield total


@lru_cache(maxsize=64)
def _first_place(max_error: float, delta: float) -> int:
    """The fewest pairs that pass with half as large a share of errors as is allowed.

    With fewer, an error too many by chance would end the test before it has begun.
    """
    return _pairs_needed(max_error / 2, max_error, delta) or _MOST_LABELS


def _pairs_needed(share: float, max_error: float, delta: float) -> int | None:
    """About the fewest pairs that pass if this share of them is wrong; None if no number does.

    About, since the wrong ones are rounded up: some numbers pass, and not all larger ones.
    """
    if share >= max_error:
        return None

    def passes(pairs: int) -> bool:
        return math.ceil(share * pairs) <= most_errors(pairs, max_error, delta)

    low, high = 0, 1
    while not passes(high):
        if high > _MOST_LABELS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
