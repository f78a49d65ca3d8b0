"""The totals of an installation: its current jobs and tasks, and counters."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import redis
from redis.client import Pipeline

from cwpo.types import JobState

Count = Literal[
    "rows_annotated",
    "rows_failed",
    "retries",
    "jobs_completed",
    "jobs_completed_with_errors",
    "jobs_failed",
    "jobs_cancelled",
]

_KEY = "cwpo:totals"
_RECONCILED = "cwpo:reconciled"
RECONCILED_SECONDS = 60
_REFUSED = "cwpo:tasks:refused"
# Longer than the pause before a refused task is tried again.
_REFUSED_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Totals:
    """The state of an installation at one moment.

    jobs: number of jobs that have not ended, by state.
    waiting, delayed, running: number of tasks that wait, that are to be retried later, and that
        run; a task is a plan, a merge, or up to eight shards.
    unqueued: number of tasks of planned jobs whose turn has not come.
    waited_seconds: seconds that the first waiting task has waited; 0 if none waits.
    waiting_for_model: number of jobs that wait because no replica hosts their annotator.
    refused: number of tasks that wait because the service refused the API key of their worker.
    workers: number of workers; one that was killed counts for up to two minutes more.
    is_reconciled: whether a round of a worker's reconciler has succeeded in the last minute.
    counts: counters of events, which start at zero when Redis is empty.
    """

    jobs: Counter[JobState]
    waiting: int
    delayed: int
    running: int
    unqueued: int
    waited_seconds: float
    waiting_for_model: int
    refused: int
    workers: int
    is_reconciled: bool
    counts: Mapping[Count, int]


def note_refused(connection: redis.Redis, task_id: str) -> None:
    """Count a task whose API key the service refused, until it is due to be tried again."""
    now = time.time()
    with connection.pipeline(transaction=True) as pipe:
        pipe.zadd(_REFUSED, {task_id: now})
        pipe.zremrangebyscore(_REFUSED, "-inf", now - _REFUSED_SECONDS)
        pipe.execute()


def count_refused(connection: redis.Redis) -> int:
    """Number of tasks whose last attempt was refused."""
    return connection.zcount(_REFUSED, time.time() - _REFUSED_SECONDS, "+inf")


def note_reconciled(connection: redis.Redis) -> None:
    """Record that a round of the reconciler has succeeded."""
    connection.set(_RECONCILED, 1, ex=RECONCILED_SECONDS)


def is_reconciled(connection: redis.Redis) -> bool:
    """Whether a round of the reconciler has succeeded in the last minute."""
    return bool(connection.exists(_RECONCILED))


def add_to_count(connection: redis.Redis | Pipeline, count: Count, amount: int = 1) -> None:
    """Add to a counter, at once or with the pipeline."""
    connection.hincrby(_KEY, count, amount)


def read_counts(connection: redis.Redis) -> dict[Count, int]:
    """All counters that are not zero."""
    raw = cast("dict[bytes, bytes]", connection.hgetall(_KEY))
    return {cast(Count, name.decode()): int(value) for name, value in raw.items()}
