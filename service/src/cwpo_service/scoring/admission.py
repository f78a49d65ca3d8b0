"""Accepts or refuses requests, before their body is parsed, and limits the waiting work."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cwpo_service.problems import ProblemError
from cwpo_service.scoring.batcher import Batcher
from cwpo_service.scoring.hosting import Hosting
from cwpo_service.scoring.moving_average import MovingAverage
from cwpo_service.telemetry.timings import Timings

# The estimate before the first request: a token of English text has about four bytes.
_TOKENS_PER_BYTE = 0.25
_MAX_RETRY_AFTER = 60


class Reservation:
    """Queue space for an admitted request until its items are queued, and the request's timings.

    Args:
        size: size of the request's body in bytes.
        tokens: expected number of tokens in the body.
        revision: revision that the annotator has to have; None for any.
    """

    def __init__(self, size: int, tokens: float, revision: str | None) -> None:
        self.size = size
        self.tokens = tokens
        self.revision = revision
        self.timings = Timings()


class Admission:
    """Accepts requests, unless the service is draining, has no annotator, or has too much to do.

    Waiting work is counted in tokens. For admitted requests that are not tokenised yet, the number
    is estimated from the size of the body and the tokens per byte of earlier bodies.

    Args:
        bound: maximum number of tokens that wait to be scored.
    """

    def __init__(self, hosting: Hosting, batcher: Batcher, *, bound: int) -> None:
        self.draining = asyncio.Event()
        self._hosting = hosting
        self._batcher = batcher
        self._bound = bound
        self._reserved = 0.0
        self._tokens_per_byte = MovingAverage(_TOKENS_PER_BYTE)
        self._admitted = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        """Tokens in the queue, plus the estimated tokens of requests that are not queued yet."""
        return self._batcher.queued_tokens + round(self._reserved)

    @property
    def is_idle(self) -> bool:
        """Whether all admitted requests are answered."""
        return self._idle.is_set()

    def check_open(self) -> None:
        """Raises: ProblemError, 503 if the service is draining."""
        if self.draining.is_set():
            raise ProblemError(503, "the service is draining", reason="draining", retry_after=5)

    def check_accepting(self, revision: str | None = None) -> None:
        """Raises: ProblemError, 503 if the service is draining, or as Hosting.used does."""
        self.check_open()
        self._hosting.check_ready(revision)

    def check(self, size: int, revision: str | None = None) -> None:
        """Check that a request may be admitted; if nothing is waiting, any size is accepted.

        Args:
            size: size of the request's body in bytes.
            revision: revision that the annotator has to have; None for any.
        Raises: ProblemError, 503 if nothing is accepted or can be scored, or the annotator has
            another revision; 429 if too many tokens are waiting, with the estimated time to score
            them as Retry-After.
        """
        self.check_accepting(revision)
        self._batcher.check_running()
        self._check_room(size)

    @contextmanager
    def reserve(self, size: int, revision: str | None = None) -> Iterator[Reservation]:
        """Admit a request for the duration of the block; `drain` waits until the block ends.

        The conditions that may have changed since `check`, which is called before the body is
        read, are checked again.
        Args:
            size: size of the request's body in bytes.
            revision: revision that the annotator has to have; None for any.
        Raises: ProblemError, 503 if the service is draining; 429 if too many tokens are waiting.
        """
        self.check_open()
        self._check_room(size)
        reservation = Reservation(size, self._expected_tokens(size), revision)
        self._reserved += reservation.tokens
        self._admitted += 1
        self._idle.clear()
        try:
            yield reservation
        finally:
            self._release(reservation)
            self._admitted -= 1
            if not self._admitted:
                self._idle.set()

    def extend(self, reservation: Reservation, size: int) -> None:
        """Reserve for a body whose texts are longer than the body, which has a prompt only once.

        Args:
            size: size of the body in bytes, had it the prompt for every two responses.
        Raises: ProblemError, 429 if too many tokens are waiting.
        """
        self._release(reservation)
        self._check_room(size)
        reservation.size = size
        reservation.tokens = self._expected_tokens(size)
        self._reserved += reservation.tokens

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """Release the reservation, because the body's tokens are now counted by the queue.

        Args:
            tokens: number of tokens to read, which improves later estimates.
        """
        self._release(reservation)
        # A body in which every item is invalid has no tokens to learn from.
        if tokens:
            self._tokens_per_byte.add(tokens / reservation.size)

    async def drain(self, seconds: float) -> None:
        """Stop admitting requests; return when all admitted ones are answered or the time is up."""
        self.draining.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def _check_room(self, size: int) -> None:
        waiting = self.waiting
        if not waiting or waiting + self._expected_tokens(size) <= self._bound:
            return
        rate = self._batcher.tokens_per_second
        seconds = waiting / rate if rate else 1.0
        raise ProblemError(
            429,
            f"{waiting:,} tokens are waiting, and at most {self._bound:,} may wait",
            reason="overloaded",
            retry_after=min(max(math.ceil(seconds), 1), _MAX_RETRY_AFTER),
        )

    def _expected_tokens(self, size: int) -> float:
        return size * self._tokens_per_byte.value

    def _release(self, reservation: Reservation) -> None:
        self._reserved -= reservation.tokens
        reservation.tokens = 0.0
