"""What was begun and never ended: so the death of a worker is traced to the row that it died of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis


class Trials:
    """Stretches of a shard's rows, each with how often it was begun without an end.

    The notes are in Redis, where a process that is killed leaves them.
    """

    def __init__(self, redis: redis.Redis, job_id: str, index: int) -> None:
        self._redis = redis
        self._key = trials_key(job_id)
        self._index = index

    def begin(self, stretch: str) -> int:
        """Note that it is begun; returns how often it was begun before and never ended."""
        return self._redis.hincrby(self._key, self._field(stretch), 1) - 1

    def end(self, stretch: str) -> None:
        """Forget the stretch: it can be tried again without suspicion."""
        self._redis.hdel(self._key, self._field(stretch))

    @contextmanager
    def trial(self, stretch: str) -> Iterator[int]:
        """Begin it, and end it whatever comes: only a death keeps it from its end."""
        earlier = self.begin(stretch)
        try:
            yield earlier
        finally:
            self.end(stretch)

    def _field(self, stretch: str) -> str:
        return f"{self._index} {stretch}"


def trials_key(job_id: str) -> str:
    """The Redis key of a job's notes."""
    return f"cwpo:job:{job_id}:trials"
