"""What goes on in a whole installation: jobs, tasks, and totals that only ever grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import redis
from redis.client import Pipeline

from cwpo.types import JobState

Total = Literal[
    "rows_annotated",
    "rows_failed",
    "retries",
    "jobs_completed",
    "jobs_completed_with_errors",
    "jobs_failed",
    "jobs_cancelled",
]

_TOTALS = "cwpo:totals"


@dataclass(frozen=True, slots=True)
class Activity:
    """One look at an installation.

    jobs: that have not ended, by state. waiting, delayed, running: tasks in line, to be tried
    again later, and in a worker's hands; a task is up to eight shards, a plan or a merge.
    waited_seconds: of the first in line. totals: since Redis was empty.
    """

    jobs: Counter[JobState]
    waiting: int
    delayed: int
    running: int
    waited_seconds: float
    totals: Mapping[Total, int]


def add(connection: redis.Redis | Pipeline, total: Total, amount: int = 1) -> None:
    """Add to a total, now or with the pipeline."""
    connection.hincrby(_TOTALS, total, amount)


def totals(connection: redis.Redis) -> dict[Total, int]:
    """Those to which anything was added."""
    raw = cast("dict[bytes, bytes]", connection.hgetall(_TOTALS))
    return {cast(Total, name.decode()): int(value) for name, value in raw.items()}
