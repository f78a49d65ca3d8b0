"""Confidence intervals: how far a share or mean of a sample can be from that of all data."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

# Of a standard normal variable, 95 % lie within it.
_Z = 1.959964
# 80 % of them are below.
_Z_OF_POWER = 0.841621
_RESAMPLES, _RESAMPLES_AT_ONCE = 10_000, 500


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent draws (Wilson 1927).

    Args:
        count: need not be whole: see `effective_count`.
    """
    z = _Z**2 / count
    middle = share + z / 2
    half = _Z * ((share * (1 - share) + z / 4) / count) ** 0.5
    return (middle - half) / (1 + z), (middle + half) / (1 + z)


def bootstrap(values: ArrayLike, *, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of independent values, by the percentiles of means of resamples.

    Of paired values, give the differences: a pair is then drawn as a whole (Efron 1979).

    Args:
        values: shape (n,), n > 0. Where all are equal the interval is a point, which of few values
            says nothing.
    """
    numbers = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(seed)
    means = [
        numbers[draw.integers(len(numbers), size=(_RESAMPLES_AT_ONCE, len(numbers)))].mean(axis=1)
        for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def count_needed(values: ArrayLike) -> int | None:
    """How many values would tell, with a probability of 80 %, that their mean is not 0.

    By the normal approximation, if mean and variance stay the same. None where that says nothing:
    for a mean of 0, and for equal values.

    Args:
        values: shape (n,), n > 1.
    """
    numbers = np.asarray(values, dtype=np.float64)
    mean, variance = float(numbers.mean()), float(numbers.var(ddof=1))
    if mean == 0 or variance == 0:
        return None
    return math.ceil(variance * ((_Z + _Z_OF_POWER) / mean) ** 2)


def effective_count(values: ArrayLike, groups: ArrayLike) -> float:
    """How many independent draws tell as much of the mean as these, which come in groups.

    The number of values divided by the design effect, by which values of one group are more alike
    than others (Korn and Graubard 1998): all n if each value is a group, and about the number of
    groups if the values of each are the same. It is never more than n, though values of a group may
    be less alike; and the number of groups if all values are equal, which does not tell.

    Args:
        values: shape (n,), n > 0.
        groups: that of each value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count, group_count = len(numbers), int(group.max()) + 1
    gaps = numbers - numbers.mean()
    squares = float(gaps @ gaps)
    if group_count == count or squares == 0 or group_count == 1:
        return float(group_count)
    of_groups = np.bincount(group, weights=gaps)
    effect = (of_groups @ of_groups) / squares * (group_count / (group_count - 1))
    effect *= (count - 1) / count
    return count / max(1.0, float(effect))
