"""Scores the items of many requests together, in batches on the device.

The items of a request are an Entry in one of two lanes. Whenever the device is free, the next batch
is filled greedily up to the token budget, interactive requests first; a request larger than the
budget is split over several batches. An entry leaves the queue when its request is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from cwpo.types import Priority
from cwpo_annotator.backends.base import BackendUnavailableError
from cwpo_annotator.scores import Scores
from cwpo_service.problems import ProblemError
from cwpo_service.scoring.device import Device
from cwpo_service.scoring.moving_average import MovingAverage
from cwpo_service.scoring.queue import Entry, Part, TokenQueue
from cwpo_service.telemetry.metrics import Metrics

logger = logging.getLogger("cwpo_service")


class Batcher:
    """Scores entries in batches on the device.

    Args:
        budget: returns the maximum number of tokens in a batch; called for each batch.
        probe: scores a valid built-in item, to distinguish a bad request from a broken backend.
        stuck_seconds: seconds that a batch may take before the device counts as stuck.
    """

    def __init__(
        self,
        device: Device,
        metrics: Metrics,
        *,
        budget: Callable[[], int],
        probe: Callable[[], object] = lambda: None,
        stuck_seconds: float = float("inf"),
    ) -> None:
        self._device = device
        self._metrics = metrics
        self._budget = budget
        self._probe = probe
        self._stuck_seconds = stuck_seconds
        self._queue = TokenQueue()
        self._speed = MovingAverage()
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._scoring_since: float | None = None
        self._backend_is_dead = False

    def start(self) -> None:
        """Start to score queued entries."""
        self._loop_task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Stop scoring; a batch that is on the device finishes, but its scores are dropped."""
        if self._loop_task is not None:
            self._loop_task.cancel()

    @property
    def queued_tokens(self) -> int:
        """Number of tokens that wait to be scored."""
        return self._queue.tokens

    @property
    def queue_age(self) -> float:
        """Seconds that the oldest queued entry has waited; 0 if the queue is empty."""
        return self._queue.age()

    @property
    def tokens_per_second(self) -> float:
        """Moving average of the speed of scoring; 0 before the first batch."""
        return self._speed.value

    @property
    def is_dead(self) -> bool:
        """Whether the batcher itself has ended, so that nothing will be scored any more."""
        return self._loop_task is not None and self._loop_task.done()

    @property
    def scoring_seconds(self) -> float:
        """Seconds since the current batch began; 0 if no batch is being scored."""
        return 0.0 if self._scoring_since is None else time.perf_counter() - self._scoring_since

    def check_running(self) -> None:
        """Raises: ProblemError, 503 if the batcher has ended or the backend is broken."""
        if self.is_dead or self._backend_is_dead:
            what = "batcher" if self.is_dead else "backend"
            raise ProblemError(
                503, f"the {what} has failed; the service must be restarted", reason="dead"
            )

    def check_alive(self) -> None:
        """Raises: ProblemError, 503 if the service must be restarted."""
        self.check_running()
        seconds = self.scoring_seconds
        if seconds > self._stuck_seconds:
            raise ProblemError(
                503, f"a batch has been stuck on the device for {seconds:.0f} s", reason="stuck"
            )

    async def score(self, entry: Entry, priority: Priority) -> Scores:
        """The scores of the entry's items, in order; cancelling the call removes the entry.

        Raises: ProblemError, 500 if the scorer fails, 503 if the backend is unavailable or the
            batcher has ended; any other exception is a bug of the service.
        """
        self.check_running()
        if not entry.items:
            return entry.score(entry.items)
        self._queue.add(entry, priority)
        self._arrived.set()
        try:
            return await entry.future
        finally:
            self._queue.discard(entry)

    async def _run(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while parts := self._queue.take(self._budget()):
                    try:
                        await self._score(parts)
                    except Exception as error:
                        # A bug: it fails only the requests in this batch, which report it.
                        for part in parts:
                            part.fail(error)
        finally:
            for entry in list(self._queue.entries()):
                if not entry.future.done():
                    entry.future.set_exception(_stopped())

    async def _score(self, parts: Sequence[Part]) -> None:
        """Score one batch; if it fails, score each request alone, so that only bad ones fail."""
        begun = time.perf_counter()
        for part in parts:
            if part.entry.begun is None:
                part.entry.begun = begun
                self._metrics.queue_seconds.observe(begun - part.entry.since)
        items = [item for part in parts for item in part.items]
        self._scoring_since = begun
        try:
            scores = await self._device.run(parts[0].entry.score, items)
            if len(scores) != len(items):
                raise RuntimeError(
                    f"the annotator returned {len(scores)} scores for {len(items)} items"
                )
        except asyncio.CancelledError:
            # The device continues with the batch, so it still counts as scoring.
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
        """After a failure, check whether the backend is broken, as after the loss of a GPU."""
        try:
            await self._device.run(self._probe)
        except BackendUnavailableError:
            pass  # It may recover, and /health/ready reports it until then.
        except Exception as error:
            logger.critical("nothing can be scored any more", exc_info=error)
            self._backend_is_dead = True

    def _measure(self, parts: Sequence[Part], items: int, begun: float) -> None:
        seconds = time.perf_counter() - begun
        tokens = sum(part.tokens for part in parts)
        self._speed.add(tokens / seconds)
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
        503, "the service stopped before it scored this request", reason="stopped", retry_after=5
    )
