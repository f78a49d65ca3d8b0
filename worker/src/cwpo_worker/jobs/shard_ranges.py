"""Numbers of shards as ranges, of which a job has few, however many shards it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Each range is its first number, and the first one after it.
Ranges = list[tuple[int, int]]


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same numbers as ascending ranges with gaps between them."""
    kept: Ranges = []
    for start, stop in sorted(ranges):
        if kept and start <= kept[-1][1]:
            kept[-1] = kept[-1][0], max(stop, kept[-1][1])
        elif start < stop:
            kept.append((start, stop))
    return kept


def numbers_in(ranges: Ranges) -> Iterator[int]:
    """The numbers, ascending if the ranges are."""
    for start, stop in ranges:
        yield from range(start, stop)
