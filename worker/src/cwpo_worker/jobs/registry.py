"""The records of all jobs: in Redis, changed atomically, with a copy in the store."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, cast

import redis
from redis.client import Pipeline

from cwpo.types import FINAL_STATES, JobState
from cwpo_worker.errors import (
    BlobNotFoundError,
    DamagedRecordError,
    InvalidCursorError,
    JobStoppedError,
    RecoveringError,
    StoreError,
    UnknownJobError,
)
from cwpo_worker.jobs.attempts import attempts_key
from cwpo_worker.jobs.finished_shards import former_key, shard_keys
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.jobs.record import JobRecord
from cwpo_worker.jobs.turns import TURNS, Turn
from cwpo_worker.queue.totals import Count, add_to_count
from cwpo_worker.storage.store import BlobStore

INDEX = "cwpo:jobs"
ACTIVE = "cwpo:jobs:active"
DELETED = "cwpo:jobs:deleted"
# The server's run id once the store's jobs are known to it: a restart or a flush unsets it.
_RESTORED = "cwpo:restored"
_PAGE = 100
_CURSOR = re.compile(r"[0-9a-f]{16}-job-[0-9a-f]{24}")

log = logging.getLogger(__name__)


class JobRegistry:
    """The records of all jobs.

    Redis is authoritative; the copy in the store serves to rebuild Redis. If a copy is outdated,
    some work is repeated, but results stay the same, since each is published only once.
    """

    def __init__(self, redis: redis.Redis, store: BlobStore) -> None:
        self._redis = redis
        self._store = store

    def create(self, record: JobRecord) -> JobRecord:
        """Store a new record; returns the existing record if there is one with its id."""
        with self._store.create(_mirror_key(record.id)) as mirror:
            mirror.write(record.model_dump_json().encode())
        return self.restore(record if mirror.published else self._mirror(record.id))

    def restore(self, record: JobRecord) -> JobRecord:
        """Restore a record that is missing, damaged or older in Redis; returns the newer one."""

        def attempt(pipe: Pipeline) -> JobRecord:
            raw = cast("bytes | None", pipe.get(_record_key(record.id)))
            known = None if raw is None else _readable(raw, record.id)
            if known is not None and known.version >= record.version:
                return known
            pipe.multi()
            self._write(pipe, record)
            return record

        return self._transaction(attempt, record.id)

    def restore_lost(self) -> None:
        """Restore from the store what Redis lost when it was last restarted or emptied."""
        if not self._is_restored():
            for record in self._mirrored():
                self.restore(record)
            self._redis.set(_RESTORED, self._run_id())

    def _mirrored(self) -> Iterator[JobRecord]:
        """All records in the store."""
        for folder in self._store.list("jobs"):
            job_id = folder.rsplit("/", 1)[-1]
            with suppress(BlobNotFoundError):
                record = _readable(self._store.read(_mirror_key(job_id)), job_id)
                if record is not None:
                    yield record

    def get(self, job_id: str) -> JobRecord:
        """The current record.

        Raises: UnknownJobError; RecoveringError if Redis has lost it; DamagedRecordError.
        """
        raw = cast("bytes | None", self._redis.get(_record_key(job_id)))
        if raw is None and not self._is_restored() and self._store.exists(_mirror_key(job_id)):
            raise RecoveringError(
                f"the job queue has lost job {job_id}: it is being restored from the store"
            )
        record = None if raw is None else JobRecord.parse(raw, job_id)
        if record is None or record.deleted:
            raise UnknownJobError(f"there is no job {job_id}")
        return record

    def exists(self, job_id: str) -> bool:
        """Whether Redis has a record of the job, even of a deleted one."""
        return bool(self._redis.exists(_record_key(job_id)))

    def expect(self, job_id: str, *states: JobState) -> JobRecord:
        """The record, if it is in one of the states. Raises: JobStoppedError if not."""
        record = self.get(job_id)
        if record.state not in states:
            raise JobStoppedError(f"job {job_id} is {record.state}")
        return record

    def change(self, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Replace the record by `change(record)`, atomically; `change` may be called repeatedly.

        Raises: UnknownJobError, and whatever `change` raises.
        """

        def attempt(pipe: Pipeline) -> JobRecord:
            known = self._read(pipe, job_id)
            if known is None or known.deleted:
                raise UnknownJobError(f"there is no job {job_id}")
            changed = change(known)
            if changed == known:
                return known
            changed = changed.model_copy(update={"version": known.version + 1})
            pipe.multi()
            self._write(pipe, changed)
            if changed.state != known.state and changed.state in FINAL_STATES:
                add_to_count(pipe, cast(Count, f"jobs_{changed.state}"))
            return changed

        record = self._transaction(attempt, job_id)
        try:
            self._store.put(_mirror_key(job_id), record.model_dump_json().encode())
        except StoreError as error:
            log.warning("job %s: its record was not copied to the store: %s", job_id, error)
        return record

    def give_turn(self, job_id: str) -> None:
        """Give a turn to a job whose shards are being annotated, and that has none.

        It is one that a version without turns has planned.
        """

        def attempt(pipe: Pipeline) -> JobRecord:
            record = self._read(pipe, job_id)
            if record is None:
                raise UnknownJobError(f"there is no job {job_id}")
            pipe.multi()
            self._write(pipe, record)
            return record

        self._transaction(attempt, job_id)

    def active(self) -> list[str]:
        """The ids of the jobs that have not ended."""
        ids = cast("set[bytes]", self._redis.smembers(ACTIVE))
        return sorted(job_id.decode() for job_id in ids)

    def active_records(self) -> dict[str, JobRecord]:
        """The jobs that have not ended; one whose record is damaged is left out."""
        records: dict[str, JobRecord] = {}
        for job_id in self.active():
            with suppress(UnknownJobError, DamagedRecordError):
                records[job_id] = self.get(job_id)
        return records

    def active_states(self) -> dict[str, JobState]:
        """The states of the jobs that have not ended; one whose record is damaged is left out."""
        return {job_id: record.state for job_id, record in self.active_records().items()}

    def deleted(self) -> list[str]:
        """The ids of the deleted jobs whose blobs still have to be removed."""
        ids = cast("set[bytes]", self._redis.smembers(DELETED))
        return sorted(job_id.decode() for job_id in ids)

    def purge(self, job_id: str) -> None:
        """Remove everything of a deleted job from the store, then from Redis."""
        self._store.delete_folder(JobFolder(job_id).path)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(_record_key(job_id), *_shards_of(job_id))
            pipe.srem(DELETED, job_id)
            pipe.execute()

    def newest(
        self,
        owner: str | None,
        cursor: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Iterator[tuple[str, JobRecord]]:
        """Records, newest first, each with the cursor of the next page after it.

        Args:
            created_after, created_before: times with a time zone; the first is inclusive, the
                second exclusive.
        Raises: InvalidCursorError.
        """
        if cursor is not None and not _CURSOR.fullmatch(cursor):
            raise InvalidCursorError("the cursor is not the next_cursor of a page of jobs")
        index = INDEX if owner is None else _owner_key(owner)
        bounds = [] if cursor is None else [cursor]
        bounds += [] if created_before is None else [_microseconds(created_before)]
        after = b"(" + min(bounds).encode() if bounds else b"+"
        oldest = b"-" if created_after is None else b"[" + _microseconds(created_after).encode()
        while True:
            members = cast(
                "list[bytes]", self._redis.zrevrangebylex(index, after, oldest, 0, _PAGE)
            )
            if not members:
                return
            keys = [_record_key(member.decode()[17:]) for member in members]
            for member, raw in zip(members, cast("list[Any]", self._redis.mget(keys)), strict=True):
                place = member.decode()
                if raw is not None and (record := _readable(raw, place[17:])) is not None:
                    yield place, record
            after = b"(" + members[-1]

    def _is_restored(self) -> bool:
        return self._redis.get(_RESTORED) == self._run_id()

    def _run_id(self) -> bytes:
        return str(self._redis.info("server")["run_id"]).encode()

    def _mirror(self, job_id: str) -> JobRecord:
        return JobRecord.parse(self._store.read(_mirror_key(job_id)), job_id)

    def _read(self, pipe: Pipeline, job_id: str) -> JobRecord | None:
        raw = cast("bytes | None", pipe.get(_record_key(job_id)))
        return None if raw is None else JobRecord.parse(raw, job_id)

    def _write(self, pipe: Pipeline, record: JobRecord) -> None:
        pipe.set(_record_key(record.id), record.model_dump_json())
        if record.deleted:
            self._hide(pipe, record)
            return
        if record.state in ("queued", "running"):
            pipe.hsetnx(TURNS, record.id, Turn.of(record).model_dump_json())
        else:
            pipe.hdel(TURNS, record.id)
        member = _member(record)
        pipe.zadd(INDEX, {member: 0})
        if record.owner is not None:
            pipe.zadd(_owner_key(record.owner), {member: 0})
        if record.state in FINAL_STATES:
            pipe.srem(ACTIVE, record.id)
            pipe.delete(*_shards_of(record.id), attempts_key(record.id))
        else:
            pipe.sadd(ACTIVE, record.id)

    def _hide(self, pipe: Pipeline, record: JobRecord) -> None:
        pipe.zrem(INDEX, _member(record))
        if record.owner is not None:
            pipe.zrem(_owner_key(record.owner), _member(record))
        pipe.sadd(DELETED, record.id)

    def _transaction(self, attempt: Callable[[Pipeline], JobRecord], job_id: str) -> JobRecord:
        record = self._redis.transaction(
            attempt,  # type: ignore[arg-type]
            _record_key(job_id),
            value_from_callable=True,
        )
        return cast(JobRecord, record)


def _readable(data: bytes, job_id: str) -> JobRecord | None:
    """The record; None, and a warning in the log, if it cannot be read."""
    try:
        return JobRecord.parse(data, job_id)
    except DamagedRecordError as error:
        log.warning("%s", error)
        return None


def _member(record: JobRecord) -> str:
    """Its place in the indices: they are in the order of these."""
    return f"{_microseconds(record.created_at)}-{record.id}"


def _microseconds(moment: datetime) -> str:
    """A moment since 1970 so that the order of the texts is that of the moments."""
    return f"{max(0, int(moment.timestamp() * 1e6)):016x}"


def _record_key(job_id: str) -> str:
    return f"cwpo:job:{job_id}"


def _shards_of(job_id: str) -> list[str]:
    """The keys of what is known of its shards while it has not ended."""
    return [*shard_keys(job_id), former_key(job_id)]


def _owner_key(owner: str) -> str:
    return f"{INDEX}:of:{owner}"


def _mirror_key(job_id: str) -> str:
    return f"jobs/{job_id}/job.json"
