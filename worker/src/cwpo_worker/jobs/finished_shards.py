"""The finished shards of jobs, and the counters of their rows."""

from __future__ import annotations

from typing import NamedTuple, cast

import redis

from cwpo.types import FINAL_STATES, JobProgress
from cwpo_worker.jobs.record import JobRecord, now

# A shard counts once, however often it is finished. Returns how many are finished.
_ADD = """
if redis.call('SETBIT', KEYS[1], ARGV[1], 1) == 0 then
    redis.call('HINCRBY', KEYS[2], 'shards', 1)
    redis.call('HINCRBY', KEYS[2], 'annotated', ARGV[2])
    redis.call('HINCRBY', KEYS[2], 'failed', ARGV[3])
    redis.call('HINCRBY', KEYS[2], 'pairs', ARGV[4])
end
redis.call('SREM', KEYS[3], ARGV[1])
return tonumber(redis.call('HGET', KEYS[2], 'shards'))
"""


class RowCounts(NamedTuple):
    """The numbers of annotated and failed input rows of a finished shard, and of dataset rows."""

    annotated: int
    failed: int
    pairs: int


class FinishedShards:
    """The finished shards of each job that has not ended, in Redis.

    One bit per shard says whether it is finished, and counters say what the finished ones hold, so
    that the progress of a job costs the same however many shards it has.
    """

    def __init__(self, redis: redis.Redis) -> None:
        self._redis = redis
        self._add = redis.register_script(_ADD)

    def add(self, job_id: str, index: int, counts: RowCounts) -> int:
        """Record that the shard is finished, and not queued any more; repeating changes nothing.

        Returns: how many shards of the job are finished.
        """
        return cast(int, self._add(list(shard_keys(job_id)), [index, *counts]))

    def count(self, job_id: str) -> int:
        """How many shards of the job are finished."""
        _, counters, _ = shard_keys(job_id)
        return int(cast("bytes | None", self._redis.hget(counters, "shards")) or 0)

    def contains(self, job_id: str, index: int) -> bool:
        """Whether the shard is finished."""
        return bool(self._redis.getbit(shard_keys(job_id).finished, index))

    def progress(self, record: JobRecord) -> JobProgress:
        """The progress of the job: as recorded if it has ended, otherwise from its counters."""
        if record.state in FINAL_STATES:
            return record.progress
        annotated, failed, pairs = self._rows(record.id)
        rate = None
        if record.started_at is not None and annotated + failed:
            seconds = (now() - record.started_at).total_seconds()
            rate = (annotated + failed) / seconds if seconds > 0 else None
        done = annotated + failed + record.rejected
        total = record.progress.rows_total
        return JobProgress(
            rows_total=total,
            rows_done=done,
            rows_annotated=annotated,
            rows_failed=failed + record.rejected,
            pairs_annotated=None if record.pairs is None else pairs,
            rows_per_second=rate,
            eta_seconds=(total - done) / rate if rate and total is not None else None,
        )

    def _rows(self, job_id: str) -> RowCounts:
        names = RowCounts._fields
        values = cast("list[bytes | None]", self._redis.hmget(shard_keys(job_id).counters, names))
        return RowCounts(*(int(value or 0) for value in values))


class ShardKeys(NamedTuple):
    """The Redis keys of the shards of a job that has not ended.

    finished: a bit per shard. counters: the numbers of finished shards and of their rows.
    queued: the numbers of the shards that were queued and are not finished.
    """

    finished: str
    counters: str
    queued: str


def shard_keys(job_id: str) -> ShardKeys:
    """The keys of this job."""
    key = f"cwpo:job:{job_id}"
    return ShardKeys(f"{key}:finished", f"{key}:counters", f"{key}:queued")


def former_key(job_id: str) -> str:
    """Where version 0.2 kept the finished shards; their parts tell the same."""
    return f"cwpo:job:{job_id}:parts"
