"""Counts of attempts that began but never ended, to find the row that makes workers crash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis


class Attempts:
    """How often work on each range of a shard's rows began but never ended.

    The counts are in Redis, so that they remain when a process is killed.
    """

    def __init__(self, redis: redis.Redis, job_id: str, index: int) -> None:
        self._redis = redis
        self._key = attempts_key(job_id)
        self._index = index

    def begin(self, stretch: str) -> int:
        """Count an attempt; returns how many earlier attempts never ended."""
        return self._redis.hincrby(self._key, self._field(stretch), 1) - 1

    def end(self, stretch: str) -> None:
        """Reset the count of the range."""
        self._redis.hdel(self._key, self._field(stretch))

    @contextmanager
    def attempt(self, stretch: str) -> Iterator[int]:
        """Begin and end an attempt; it also ends on an error, but not if the process is killed."""
        earlier = self.begin(stretch)
        try:
            yield earlier
        finally:
            self.end(stretch)

    def _field(self, stretch: str) -> str:
        return f"{self._index} {stretch}"


def attempts_key(job_id: str) -> str:
    """The Redis key of a job's attempts."""
    return f"cwpo:job:{job_id}:trials"
