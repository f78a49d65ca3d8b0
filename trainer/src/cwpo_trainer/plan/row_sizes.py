"""The sizes of the packed rows that training reads."""

from __future__ import annotations

import math
from collections.abc import Iterable

# On a CPU, the activations of a row stay in memory that is used again for the next; a GPU reads
# what the user has asked to fit in it, up to where more is no faster.
_TOKENS = {"cpu": 1024, "cuda": 65536}

ROW_MULTIPLE = 64
"""Rows of few different lengths find memory and compiled matrix products of their size again."""


def row_tokens(device_type: str) -> int:
    """Maximum number of tokens of a row, unless a single pair or text has more."""
    return _TOKENS.get(device_type, 8192)


def filled(sizes: Iterable[int], limit: int | None, *, multiple: int = ROW_MULTIPLE) -> list[int]:
    """Tokens of the rows that items of these sizes make, nearly equal ones, as they are filled up.

    Args:
        limit: maximum number of a row of several items; None for one row.
        multiple: number of tokens that rows are filled up to a multiple of.
    """
    items = [*sizes]
    count = (
        1 if limit is None else max(1, math.ceil(sum(min(size, limit) for size in items) / limit))
    )
    row = math.ceil(sum(items) / count / multiple) * multiple
    return [row] * count
