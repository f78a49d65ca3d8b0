"""Who waits for the device: the items of many requests, in two lanes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cwpo.types import Priority

# Batches that the batch lane lets go first before it is served first itself.
PATIENCE = 4

Scores = NDArray[np.float32]
Scorer = Callable[[Sequence[Any]], Scores]


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

    def age(self) -> float:
        """Seconds that the longest waiting entry has waited; 0 for none."""
        since = min((entry.since for entry in self.entries()), default=None)
        return 0.0 if since is None else time.perf_counter() - since

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
