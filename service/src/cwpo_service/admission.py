"""How much work may wait: asked before a request's body is read, let alone understood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cwpo_service.problems import ProblemError

# Before the first request tells better: of English text about four bytes become a token.
_TOKENS_PER_BYTE = 0.25
_MEMORY = 0.8
_MAX_RETRY_AFTER = 60


class Room:
    """Tokens kept free for a body whose texts are not tokenised yet."""

    def __init__(self, size: int, tokens: float) -> None:
        self.size = size
        self.tokens = tokens


class Admission:
    """Bounds the tokens that wait, those of requests on their way to the queue included.

    How many tokens a body will have is estimated from its bytes, at the rate of the bodies before.

    Args:
        bound: tokens that may wait.
        queued: tells how many tokens are in the queue.
    """

    def __init__(self, bound: int, queued: Callable[[], int]) -> None:
        self._bound = bound
        self._queued = queued
        self._held = 0.0
        self._tokens_per_byte: float | None = None
        self._tokens_per_second: float | None = None

    @property
    def waiting(self) -> int:
        """Tokens in the queue or, by estimate, on their way to it."""
        return self._queued() + round(self._held)

    def check(self, size: int) -> None:
        """Whether a body of so many bytes may come in; where nothing waits, any may.

        Raises: ProblemError, 429, with the time in which the queue drains.
        """
        waiting = self.waiting
        if not waiting or waiting + self._estimate(size) <= self._bound:
            return
        seconds = waiting / self._tokens_per_second if self._tokens_per_second else 1.0
        raise ProblemError(
            429,
            f"{waiting:,} tokens are waiting already, and at most {self._bound:,} may",
            reason="overloaded",
            retry_after=min(max(math.ceil(seconds), 1), _MAX_RETRY_AFTER),
        )

    @contextmanager
    def room(self, size: int) -> Iterator[Room]:
        """Keep room for a body of so many bytes, until its tokens are queued or it fails.

        Raises: ProblemError, 429, as check does.
        """
        self.check(size)
        room = Room(size, self._estimate(size))
        self._held += room.tokens
        try:
            yield room
        finally:
            self._free(room)

    def settle(self, room: Room, tokens: int) -> None:
        """The body turned out to have so many tokens, which the queue counts from now on."""
        self._free(room)
        # Of a body in which every item is wrong nothing can be learnt.
        if tokens:
            self._tokens_per_byte = _remembered(self._tokens_per_byte, tokens / room.size)

    def drained(self, tokens: int, seconds: float) -> None:
        """So many tokens were scored in so long."""
        self._tokens_per_second = _remembered(self._tokens_per_second, tokens / seconds)

    def _estimate(self, size: int) -> float:
        rate = _TOKENS_PER_BYTE if self._tokens_per_byte is None else self._tokens_per_byte
        return size * rate

    def _free(self, room: Room) -> None:
        self._held -= room.tokens
        room.tokens = 0.0


def _remembered(before: float | None, now: float) -> float:
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now
