"""Confidence intervals of shares: how far a share of a sample can be from that of all data."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

# Of a standard normal variable, 95 % lie within it.
_Z = 1.959964


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent draws (Wilson 1927).

    Args:
        count: need not be whole: see `effective_count`.
    """
    z = _Z**2 / count
    middle = share + z / 2
    half = _Z * ((share * (1 - share) + z / 4) / count) ** 0.5
    return (middle - half) / (1 + z), (middle + half) / (1 + z)


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
