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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cwpo.types import Priority
from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError

# Batches that the batch lane lets go first before it is served first itself.
PATIENCE = 4
_RATE_MEMORY = 0.8
_MAX_RETRY_AFTER = 60

Scores = NDArray[np.float32]
Scorer = Callable[[Sequence[Any]], Scores]

logger = logging.getLogger("cwpo_service")


class Item(Protocol):
    """What is scored: a pair or a text, whose length is known."""

    @property
    def tokens(self) -> int:
        """Tokens the model reads."""
        ...


@dataclass(eq=False, slots=True)
class Entry:
    """One request's items; those from `taken` on wait to be scored."""

    items: Sequence[Item]
    sizes: Sequence[int]
    score: Scorer
    future: asyncio.Future[Scores]
    tokens: int
    since: float
    taken: int = 0
    scores: list[Scores] = field(default_factory=list)

    def take(self, room: int, *, at_least: int) -> Part:
        """The next items: as many as there is room for in tokens, but at least so many."""
        start = stop = self.taken
        tokens = 0
        for size in self.sizes[start:]:
            if tokens + size > room and stop - start >= at_least:
                break
            tokens += size
            stop += 1
        self.taken = stop
        self.tokens -= tokens
        return Part(self, self.items[start:stop], tokens)


@dataclass(frozen=True, slots=True)
class Part:
    """Those items of an entry that are in one batch."""

    entry: Entry
    items: Sequence[Item]
    tokens: int

    def resolve(self, scores: Scores) -> None:
        """Hand over the scores; the last part hands the entry's to whoever waits."""
        entry = self.entry
        entry.scores.append(scores)
        if entry.taken == len(entry.items) and not entry.future.done():
            is_whole = len(entry.scores) == 1
            entry.future.set_result(scores if is_whole else np.concatenate(entry.scores))

    def fail(self, error: Exception) -> None:
        """Fail the whole entry: half an answer is none."""
        if not self.entry.future.done():
            self.entry.future.set_exception(error)


class TokenQueue:
    """Entries in two lanes, and how many tokens wait in them."""

    def __init__(self) -> None:
        self.tokens = 0
        self._lanes: dict[Priority, deque[Entry]] = {"interactive": deque(), "batch": deque()}
        self._passed_over = 0

    def add(self, entry: Entry, priority: Priority) -> None:
        """Put the entry at the end of its lane."""
        self._lanes[priority].append(entry)
        self.tokens += entry.tokens

    def discard(self, entry: Entry) -> None:
        """Forget what is left of the entry."""
        for lane in self._lanes.values():
            if entry in lane:
                lane.remove(entry)
                self.tokens -= entry.tokens

    def take(self, budget: int) -> list[Part]:
        """The next batch: of one scorer, within the budget unless a single item is larger."""
        parts: list[Part] = []
        room = budget
        for lane in self._in_turn():
            while lane and (not parts or lane[0].score == parts[0].entry.score):
                part = lane[0].take(room, at_least=0 if parts else 1)
                if not part.items:
                    return parts
                parts.append(part)
                room -= part.tokens
                self.tokens -= part.tokens
                if part.entry.taken < len(part.entry.items):
                    # To the end of the line, so that small requests don't wait for a big one.
                    lane.rotate(-1)
                    return parts
                lane.popleft()
        return parts

    def entries(self) -> Iterator[Entry]:
        """All that wait."""
        for lane in self._lanes.values():
            yield from lane

    def _in_turn(self) -> tuple[deque[Entry], deque[Entry]]:
        interactive, batch = self._lanes["interactive"], self._lanes["batch"]
        self._passed_over = self._passed_over + 1 if interactive and batch else 0
        if self._passed_over > PATIENCE:
            self._passed_over = 0
            return batch, interactive
        return interactive, batch


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
            if len(parts) == 1:
                parts[0].fail(_failed())
            else:
                for part in parts:
                    await self._score([part])
            return
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


def _failed() -> ProblemError:
    return ProblemError(
        500, "the annotator failed on this request; the service's log says why", reason="backend"
    )


def _stopped() -> ProblemError:
    return ProblemError(
        503, "the service stopped before this was scored", reason="stopped", retry_after=5
    )
