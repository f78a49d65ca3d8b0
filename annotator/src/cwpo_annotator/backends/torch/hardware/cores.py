"""Forward passes in parallel on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

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

    def each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Do the work for each item, starting with the first items; the results in their order.

        If there are fewer items than cores, all cores work on one item at a time.
        """
        if self.count == 1 or len(items) < self.count:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    # A thread takes the default number when it first shares an operation, whatever it was told
    # before: this one is large enough to be shared.
    torch.zeros(1 << 20).exp_()
