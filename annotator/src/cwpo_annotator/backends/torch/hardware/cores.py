"""Forward passes in parallel on the cores of a CPU."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

# What is left of a core's speed when twice as many work on one pass. Of two cores it is 0.9 or
# more; many cores wait for one another more than a few do.
_KEPT = 0.8

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cores:
    """Runs work in parallel, with one core for each piece of work.

    By default torch splits each operation over all threads. They wait for one another at the end of
    an operation, and for Python and the allocator before the next. With a small model this takes a
    good part of the time.

    Args:
        count: number of cores; with one, work runs in the caller's thread.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "core", _use_one_thread)
        if count > 1:
            all_there = Barrier(count)
            list(self._pool.map(lambda _: all_there.wait(), range(count)))
            # The last thread's wish has become the default of threads to come.
            torch.set_num_threads(count)

    def each(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        size: Callable[[Item], float],
    ) -> list[Result]:
        """Do the work for each item; the results in the order of the items.

        Each core takes the largest item that is left. The smallest items are done last, one at a
        time by all cores together, if so many cores would otherwise have nothing left to do that
        all would be done later.

        Args:
            size: a number that the time of an item is about proportional to.
        """
        if self.count == 1:
            return [work(item) for item in items]
        order = sorted(range(len(items)), key=lambda at: -size(items[at]))
        apart = _apart([size(items[at]) for at in order], self.count)
        done = [*self._pool.map(lambda at: work(items[at]), order[:apart])]
        done += [work(items[at]) for at in order[apart:]]
        results = dict(zip(order, done, strict=True))
        return [results[at] for at in range(len(items))]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _apart(sizes: Sequence[float], cores: int) -> int:
    """How many items, largest first, to do one on each core, so that all are done the soonest."""
    speed = cores * _KEPT ** math.log2(cores)
    waiting = [0.0] * cores
    together = sum(sizes) / speed
    best, soonest = 0, together
    for count, size in enumerate(sizes, start=1):
        heapq.heapreplace(waiting, waiting[0] + size)
        together -= size / speed
        if (end := max(waiting) + together) <= soonest:
            best, soonest = count, end
    return best


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    # A thread takes the default number when it first shares an operation, whatever it was told
    # before: this one is large enough to be shared.
    torch.zeros(1 << 20).exp_()
