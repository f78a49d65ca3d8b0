"""Batches for the one device: items of many requests wait in line and are scored together.

A request's items are an Entry in one of two lanes. Whenever the device is free, the next batch is
filled greedily up to the token budget, interactive requests first; a request too big for it is
split over several. Entries leave the queue as soon as nobody waits for their scores any more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cwpo.types import Priority
from cwpo_annotator.backends.base import BackendUnavailableError
from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError
from cwpo_service.queue import Entry, Item, Part, Scorer, Scores, TokenQueue

_RATE_MEMORY = 0.8
_MAX_RETRY_AFTER = 60

logger = logging.getLogger("cwpo_service")


class Batcher:
    """Scores items in batches on one dedicated thread.

    Args:
        budget: tokens a batch.
        bound: tokens that may wait.
    """

    def __init__(self, metrics: Metrics, *, budget: int, bound: int) -> None:
        self.device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self.budget = budget
        self._bound = bound
        self._metrics = metrics
        self._queue = TokenQueue()
        self._arrived = asyncio.Event()
        self._tokens_per_second = 0.0
        self._loop_task: asyncio.Task[None] | None = None
        self._scoring_since: float | None = None
        metrics.watch_queue(lambda: self._queue.tokens)

    def start(self) -> None:
        """Begin to score."""
        self._loop_task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Score no more; a batch on the device runs to its end unheard."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        self.device.shutdown(wait=False, cancel_futures=True)

    @property
    def is_dead(self) -> bool:
        """Whether the batcher itself has failed: nothing will ever be scored again."""
        return self._loop_task is not None and self._loop_task.done()

    @property
    def scoring_seconds(self) -> float:
        """How long the batch on the device is there; 0 for none."""
        return 0.0 if self._scoring_since is None else time.perf_counter() - self._scoring_since

    def check_room(self, tokens: int = 0) -> None:
        """Whether so many tokens may join the queue; an empty one takes any request.

        Raises: ProblemError, 429, with the time in which the queue drains; 503 for a dead batcher.
        """
        if self.is_dead:
            raise _stopped()
        waiting = self._queue.tokens
        if waiting and waiting + tokens > self._bound:
            seconds = waiting / self._tokens_per_second if self._tokens_per_second else 1.0
            raise ProblemError(
                429,
                f"{waiting:,} tokens are waiting already, and at most {self._bound:,} may",
                reason="overloaded",
                retry_after=min(max(math.ceil(seconds), 1), _MAX_RETRY_AFTER),
            )

    async def score(self, items: Sequence[Item], scorer: Scorer, priority: Priority) -> Scores:
        """The scorer's answer to all items, in order; cancel it to leave the queue.

        Raises: ProblemError, 429 when too much waits; 500 when the scorer fails.
        """
        if not items:
            return scorer(items)
        sizes = [item.tokens for item in items]
        tokens = sum(sizes)
        self.check_room(tokens)
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        entry = Entry(items, sizes, scorer, future, tokens, since=time.perf_counter())
        self._queue.add(entry, priority)
        self._arrived.set()
        try:
            return await future
        finally:
            self._queue.discard(entry)

    async def _run(self) -> None:
        try:
            while True:
                parts = self._queue.take(self.budget)
                if parts:
                    await self._score(parts)
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:
            for entry in list(self._queue.entries()):
                if not entry.future.done():
                    entry.future.set_exception(_stopped())

    async def _score(self, parts: Sequence[Part]) -> None:
        """Score one batch; if that fails, each request on its own, to fail the guilty only."""
        begun = time.perf_counter()
        items = [item for part in parts for item in part.items]
        loop = asyncio.get_running_loop()
        self._scoring_since = begun
        try:
            scores = await loop.run_in_executor(self.device, parts[0].entry.score, items)
            if len(scores) != len(items):
                raise RuntimeError(f"{len(scores)} scores came for {len(items)} items")
        except asyncio.CancelledError:
            for part in parts:
                part.fail(_stopped())
            raise
        except Exception as error:
            logger.error("a batch of %d items failed", len(items), exc_info=error)
            if len(parts) == 1 or isinstance(error, BackendUnavailableError):
                for part in parts:
                    part.fail(_failed(error))
            else:
                for part in parts:
                    await self._score([part])
            return
        finally:
            self._scoring_since = None
        self._measure(parts, len(items), begun)
        at = 0
        for part in parts:
            part.resolve(scores[at : at + len(part.items)])
            at += len(part.items)

    def _measure(self, parts: Sequence[Part], items: int, begun: float) -> None:
        seconds = time.perf_counter() - begun
        tokens = sum(part.tokens for part in parts)
        rate = tokens / seconds
        remembered = self._tokens_per_second or rate
        self._tokens_per_second = _RATE_MEMORY * remembered + (1 - _RATE_MEMORY) * rate
        self._metrics.inference_seconds.observe(seconds)
        self._metrics.batch_items.observe(items)
        self._metrics.batch_tokens.observe(tokens)
        for part in parts:
            if not part.entry.scores:
                self._metrics.queue_seconds.observe(begun - part.entry.since)


def _failed(error: Exception) -> ProblemError:
    if isinstance(error, BackendUnavailableError):
        return ProblemError(503, str(error), reason="backend", retry_after=5)
    return ProblemError(
        500, "the annotator failed on this request; the service's log says why", reason="backend"
    )


def _stopped() -> ProblemError:
    return ProblemError(
        503, "the service stopped before this was scored", reason="stopped", retry_after=5
    )
