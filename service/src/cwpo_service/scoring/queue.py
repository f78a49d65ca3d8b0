"""The queue of items to score, with a lane for interactive and one for batch requests."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cwpo.types import Priority
from cwpo_annotator.backends.base import ReadsOnce
from cwpo_annotator.scores import Scores
from cwpo_service.scoring.reading import Item, Reading, reading_of

# Batches that may prefer the interactive lane before the batch lane goes first once.
PATIENCE = 4

Scorer = Callable[[Sequence[Any]], Scores]


@dataclass(eq=False, slots=True)
class Entry:
    """The items of one request, in the order of reading; those from `taken` on wait to be scored.

    Args:
        score: scores a sequence of items; returns one score or pair of scores for each, in order.
        reads_once: what the scorer reads once if texts share it.
    """

    items: Sequence[Item]
    score: Scorer
    reads_once: ReadsOnce = "nothing"
    reading: Reading = field(init=False)
    # Number of tokens to read that still wait; each part that is taken reduces it.
    tokens: int = field(init=False)
    future: asyncio.Future[Scores] = field(init=False)
    # When it was queued and when its first batch began, in seconds of time.perf_counter.
    since: float = field(init=False)
    begun: float | None = None
    taken: int = 0
    scores: list[Scores] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reading = reading_of(self.items, self.reads_once)
        self.tokens = sum(self.reading.sizes)

    def take(self, budget: int, *, at_least: int) -> Part:
        """Take the next items, as many as fit the budget.

        Args:
            budget: maximum number of tokens.
            at_least: number of items to take even if they exceed the budget.
        """
        start = self.taken
        stop, tokens = self.reading.stretch(start, budget, at_least=at_least)
        self.taken = stop
        self.tokens -= sum(self.reading.sizes[start:stop])
        return Part(self, self.reading.items[start:stop], tokens)


@dataclass(frozen=True, slots=True)
class Part:
    """The items of an entry that are scored in one batch, and the tokens that are read for them."""

    entry: Entry
    items: Sequence[Item]
    tokens: int

    def resolve(self, scores: Scores) -> None:
        """Add the part's scores to the entry; the last part completes the entry's future."""
        entry = self.entry
        entry.scores.append(scores)
        if entry.taken == len(entry.items) and not entry.future.done():
            is_whole = len(entry.scores) == 1
            scores = scores if is_whole else Scores.concatenate(entry.scores)
            entry.future.set_result(entry.reading.in_input_order(scores))

    def fail(self, error: Exception) -> None:
        """Fail the whole entry, since a partial answer is useless."""
        if not self.entry.future.done():
            self.entry.future.set_exception(error)


class TokenQueue:
    """Entries in two lanes, with the number of tokens that wait."""

    def __init__(self) -> None:
        self.tokens = 0
        self._lanes: dict[Priority, deque[Entry]] = {"interactive": deque(), "batch": deque()}
        self._passed_over = 0

    def add(self, entry: Entry, priority: Priority) -> None:
        """Add the entry at the end of its lane."""
        entry.since = time.perf_counter()
        entry.future = asyncio.get_running_loop().create_future()
        self._lanes[priority].append(entry)
        self.tokens += entry.tokens

    def discard(self, entry: Entry) -> None:
        """Remove the rest of the entry, if it is still queued."""
        for lane in self._lanes.values():
            if entry in lane:
                lane.remove(entry)
                self.tokens -= entry.tokens

    def take(self, budget: int) -> list[Part]:
        """Take the next batch; empty if nothing waits.

        All its items have the same scorer, and at most `budget` tokens unless a single item has
        more.
        """
        parts: list[Part] = []
        left = budget
        for lane in self._in_turn():
            while lane and (not parts or lane[0].score == parts[0].entry.score):
                waiting = lane[0].tokens
                part = lane[0].take(left, at_least=0 if parts else 1)
                if not part.items:
                    return parts
                parts.append(part)
                left -= part.tokens
                self.tokens -= waiting - part.entry.tokens
                if part.entry.taken < len(part.entry.items):
                    # To the end of the lane, so that small requests do not wait for a large one.
                    lane.rotate(-1)
                    return parts
                lane.popleft()
        return parts

    def age(self) -> float:
        """Seconds that the oldest entry has waited; 0 if the queue is empty."""
        since = min((entry.since for entry in self.entries()), default=None)
        return 0.0 if since is None else time.perf_counter() - since

    def entries(self) -> Iterator[Entry]:
        """All queued entries."""
        for lane in self._lanes.values():
            yield from lane

    def _in_turn(self) -> tuple[deque[Entry], deque[Entry]]:
        interactive, batch = self._lanes["interactive"], self._lanes["batch"]
        self._passed_over = self._passed_over + 1 if interactive and batch else 0
        if self._passed_over > PATIENCE:
            self._passed_over = 0
            return batch, interactive
        return interactive, batch
