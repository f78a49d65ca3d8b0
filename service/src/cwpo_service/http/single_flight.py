"""Blocking work that is done once for all callers that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs the work on a thread of its own, once for all callers that ask while it runs.

    A store that hangs then blocks one thread, however many probes ask for it, and none of the
    threads that requests need.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._flight: Future[T] | None = None

    async def outcome(self) -> T:
        """The result of the work; raises what the work raises."""
        if self._flight is None or self._flight.done():
            self._flight = self._thread.submit(self._work)
        return await asyncio.shield(asyncio.wrap_future(self._flight))

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
