"""Batches for the one device: items of many requests wait in line and are scored together.

A request's items are an Entry in one of two lanes. Whenever the device is free, the next batch is
filled greedily up to the token budget, interactive requests first; a request too big for it is
split over several. Entries leave the queue as soon as nobody waits for their scores any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from cwpo.types import Priority
from cwpo_annotator.backends.base import BackendUnavailableError
from cwpo_service.admission import Admission, Room
from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError
from cwpo_service.queue import Entry, Item, Part, Scorer, Scores, TokenQueue

logger = logging.getLogger("cwpo_service")


class Batcher:
    """Scores items in batches on one dedicated thread.

    Args:
        budget: tokens a batch, asked for each.
        bound: tokens that may wait.
        probe: scores something that can be scored, to tell a bad request from a dead backend.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        budget: Callable[[], int],
        bound: int,
        probe: Callable[[], object] = lambda: None,
    ) -> None:
        self.device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._budget = budget
        self._backend_is_dead = False
        self._probe = probe
        self._metrics = metrics
        self._queue = TokenQueue()
        self.admission = Admission(bound, lambda: self._queue.tokens)
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._scoring_since: float | None = None
        metrics.watch_queue(lambda: self.admission.waiting, self._queue.age)

    def start(self) -> None:
        """Begin to score."""
        self._loop_task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Score no more; what the device is at runs to its end unheard."""
        if self._loop_task is not None:
            self._loop_task.cancel()
        self.device.shutdown(wait=False)

    def then(self, work: Callable[[], object]) -> None:
        """Do the work on the device's thread, after what is waiting for it already.

        Once the batcher has stopped the process is about to end, and nothing is done any more.
        """
        with suppress(RuntimeError):
            self.device.submit(work)

    @property
    def is_dead(self) -> bool:
        """Whether the batcher itself has failed: nothing will ever be scored again."""
        return self._loop_task is not None and self._loop_task.done()

    @property
    def scoring_seconds(self) -> float:
        """How long the batch on the device is there; 0 for none."""
        return 0.0 if self._scoring_since is None else time.perf_counter() - self._scoring_since

    def check_running(self) -> None:
        """Raises: ProblemError, 503, once the batcher or the backend is dead."""
        if self.is_dead or self._backend_is_dead:
            what = "batcher" if self.is_dead else "backend"
            raise ProblemError(
                503, f"the {what} has died; the service has to be restarted", reason="dead"
            )

    async def score(
        self, items: Sequence[Item], scorer: Scorer, priority: Priority, room: Room
    ) -> Scores:
        """The scorer's answer to all items, in order; cancel it to leave the queue.

        Args:
            room: what admission kept free for them.
        Raises: ProblemError, 500 when the scorer fails, 503 when the batcher has died.
        """
        self.check_running()
        sizes = [item.tokens for item in items]
        tokens = sum(sizes)
        self.admission.settle(room, tokens)
        if not items:
            return scorer(items)
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        entry = Entry(items, sizes, scorer, future, tokens, since=time.perf_counter())
        self._queue.add(entry, priority)
        self._arrived.set()
        try:
            scores = await future
        finally:
            self._queue.discard(entry)
        assert entry.begun is not None  # noqa: S101
        room.journey.stages["queue"] = (entry.since, entry.begun)
        room.journey.stages["inference"] = (entry.begun, time.perf_counter())
        return scores

    async def _run(self) -> None:
        try:
            while True:
                parts = self._queue.take(self._budget())
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
        for part in parts:
            if part.entry.begun is None:
                part.entry.begun = begun
                self._metrics.queue_seconds.observe(begun - part.entry.since)
        items = [item for part in parts for item in part.items]
        loop = asyncio.get_running_loop()
        self._scoring_since = begun
        try:
            scores = await loop.run_in_executor(self.device, parts[0].entry.score, items)
            if len(scores) != len(items):
                raise RuntimeError(f"{len(scores)} scores came for {len(items)} items")
        except asyncio.CancelledError:
            # The device goes on with it, so that it still counts as scoring.
            for part in parts:
                part.fail(_stopped())
            raise
        except Exception as error:
            self._scoring_since = None
            logger.error("a batch of %d items failed", len(items), exc_info=error)
            if len(parts) == 1 or isinstance(error, BackendUnavailableError):
                for part in parts:
                    part.fail(_failed(error))
                if not isinstance(error, BackendUnavailableError):
                    await self._check_backend()
            else:
                for part in parts:
                    await self._score([part])
            return
        self._scoring_since = None
        self._measure(parts, len(items), begun)
        at = 0
        for part in parts:
            part.resolve(scores[at : at + len(part.items)])
            at += len(part.items)

    async def _check_backend(self) -> None:
        """After a failure: whether anything can be scored yet, as it cannot on a lost GPU."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.device, self._probe)
        except BackendUnavailableError:
            pass  # It may come back, and readiness tells.
        except Exception as error:
            logger.critical("nothing can be scored any more", exc_info=error)
            self._backend_is_dead = True

    def _measure(self, parts: Sequence[Part], items: int, begun: float) -> None:
        seconds = time.perf_counter() - begun
        tokens = sum(part.tokens for part in parts)
        self.admission.drained(tokens, seconds)
        self._metrics.inference_seconds.observe(seconds)
        self._metrics.batch_items.observe(items)
        self._metrics.batch_tokens.observe(tokens)


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
