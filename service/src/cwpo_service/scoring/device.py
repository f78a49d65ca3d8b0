"""The thread on which the model runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Device:
    """Runs loading, scoring, checking and freeing one after another, on one thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the work after all earlier work; returns its result and raises its exception."""
        return await asyncio.wrap_future(self._thread.submit(work, *args, **kwargs))

    def then(self, work: Callable[[], object]) -> None:
        """Run the work after all earlier work, without waiting for it.

        After `stop` the work is ignored, since the process is about to end.
        """
        with suppress(RuntimeError):
            self._thread.submit(work)

    def stop(self) -> None:
        """Accept no more work; earlier work still runs, but is not waited for."""
        self._thread.shutdown(wait=False)
