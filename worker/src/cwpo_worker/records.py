"""Where job records live: in Redis, changed atomically, and mirrored to the store."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, cast

import redis
from redis.client import Pipeline

from cwpo.types import FINAL_STATES, JobProgress, JobState, ModelRef
from cwpo_worker import activity
from cwpo_worker.errors import (
    BlobNotFoundError,
    InvalidCursorError,
    JobStoppedError,
    StoreError,
    UnknownJobError,
)
from cwpo_worker.job import JobRecord, now
from cwpo_worker.manifest import JobFolder
from cwpo_worker.store import BlobStore
from cwpo_worker.trials import trials_key

INDEX = "cwpo:jobs"
ACTIVE = "cwpo:jobs:active"
DELETED = "cwpo:jobs:deleted"
_PAGE = 100
_CURSOR = re.compile(r"[0-9a-f]{16}-job-[0-9a-f]{24}")

log = logging.getLogger(__name__)


class PartCounts(NamedTuple):
    """Rows of one finished shard."""

    annotated: int
    failed: int


class Records:
    """Job records and the progress of their shards.

    Redis leads. The mirror in the store serves to rebuild Redis; one that is a step behind only
    costs work that is done again, since all results are published once.
    """

    def __init__(self, redis: redis.Redis, store: BlobStore) -> None:
        self._redis = redis
        self._store = store

    def create(self, record: JobRecord) -> JobRecord:
        """Keep a new record; returns the one that is already there under its id, if any."""
        with self._store.create(_mirror_key(record.id)) as mirror:
            mirror.write(record.model_dump_json().encode())
        return self.restore(record if mirror.published else self._mirror(record.id))

    def restore(self, record: JobRecord) -> JobRecord:
        """Put a record back that Redis has lost or knows an older version of; returns the newer."""

        def attempt(pipe: Pipeline) -> JobRecord:
            known = self._read(pipe, record.id)
            if known is not None and known.version >= record.version:
                return known
            pipe.multi()
            self._write(pipe, record)
            return record

        return self._transaction(attempt, record.id)

    def mirrored(self) -> Iterator[JobRecord]:
        """All records that the store knows."""
        for folder in self._store.list("jobs"):
            with suppress(BlobNotFoundError):
                yield self._mirror(folder.rsplit("/", 1)[-1])

    def get(self, job_id: str) -> JobRecord:
        """The record as it is. Raises: UnknownJobError."""
        raw = cast("bytes | None", self._redis.get(_record_key(job_id)))
        record = None if raw is None else JobRecord.model_validate_json(raw)
        if record is None or record.deleted:
            raise UnknownJobError(f"there is no job {job_id}")
        return record

    def expect(self, job_id: str, *states: JobState) -> JobRecord:
        """The record, if it is in one of the states. Raises: JobStoppedError if not."""
        record = self.get(job_id)
        if record.state not in states:
            raise JobStoppedError(f"job {job_id} is {record.state}")
        return record

    def change(self, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Replace the record by what `change` makes of it, atomically; it may be called again.

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
                activity.add(pipe, cast(activity.Total, f"jobs_{changed.state}"))
            return changed

        record = self._transaction(attempt, job_id)
        try:
            self._store.put(_mirror_key(job_id), record.model_dump_json().encode())
        except StoreError as error:
            log.warning("job %s: its record is not mirrored: %s", job_id, error)
        return record

    def move(self, job_id: str, state: JobState, **changes: Any) -> JobRecord:
        """Take the job to another state. Raises: IllegalTransitionError, UnknownJobError."""
        return self.change(job_id, lambda record: record.moved(state, **changes))

    def fail(self, job_id: str, reason: str) -> None:
        """End the job as failed, unless it is being cancelled or has ended."""

        def failed(record: JobRecord) -> JobRecord:
            if record.state in FINAL_STATES or record.state == "cancelling":
                return record
            progress = self.progress(record)
            return record.moved("failed", error=reason, progress=progress)

        self.change(job_id, failed)

    def pin_model(self, job_id: str, model: ModelRef) -> ModelRef:
        """The annotator of the job: the one that its first answer came from."""
        known = self.get(job_id).model
        if known is not None:
            return known

        def pinned(record: JobRecord) -> JobRecord:
            return record if record.model else record.model_copy(update={"model": model})

        record = self.change(job_id, pinned)
        return record.model or model

    def set_part(self, job_id: str, index: int, counts: PartCounts) -> None:
        """Note that the shard is finished."""
        self._redis.hset(_parts_key(job_id), str(index), f"{counts.annotated} {counts.failed}")

    def parts(self, job_id: str) -> dict[int, PartCounts]:
        """The finished shards."""
        raw = cast("dict[bytes, bytes]", self._redis.hgetall(_parts_key(job_id)))
        return {
            int(index): PartCounts(*(int(number) for number in counts.split()))
            for index, counts in raw.items()
        }

    def parts_done(self, job_id: str) -> int:
        """How many shards are finished."""
        return self._redis.hlen(_parts_key(job_id))

    def progress(self, record: JobRecord) -> JobProgress:
        """How far the job is: of an ended one as it was kept, otherwise from its shards."""
        if record.state in FINAL_STATES or record.progress.rows_total is None:
            return record.progress
        parts = self.parts(record.id).values()
        annotated = sum(part.annotated for part in parts)
        failed = sum(part.failed for part in parts)
        rate = None
        if record.started_at is not None and annotated + failed:
            seconds = (now() - record.started_at).total_seconds()
            rate = (annotated + failed) / seconds if seconds > 0 else None
        done = annotated + failed + record.rejected
        return JobProgress(
            rows_total=record.progress.rows_total,
            rows_done=done,
            rows_annotated=annotated,
            rows_failed=failed + record.rejected,
            rows_per_second=rate,
            eta_seconds=(record.progress.rows_total - done) / rate if rate else None,
        )

    def active(self) -> list[str]:
        """The ids of the jobs that have not ended."""
        ids = cast("set[bytes]", self._redis.smembers(ACTIVE))
        return sorted(job_id.decode() for job_id in ids)

    def active_states(self) -> dict[str, JobState]:
        """The jobs that have not ended, with their states."""
        states: dict[str, JobState] = {}
        for job_id in self.active():
            with suppress(UnknownJobError):
                states[job_id] = self.get(job_id).state
        return states

    def deleted(self) -> list[str]:
        """The ids of the jobs whose remains are still to be removed."""
        ids = cast("set[bytes]", self._redis.smembers(DELETED))
        return sorted(job_id.decode() for job_id in ids)

    def purge(self, job_id: str) -> None:
        """Remove all that a deleted job left in the store, then in Redis."""
        self._store.delete_folder(JobFolder(job_id).path)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(_record_key(job_id), _parts_key(job_id))
            pipe.srem(DELETED, job_id)
            pipe.execute()

    def newest(
        self,
        owner: str | None,
        cursor: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Iterator[tuple[str, JobRecord]]:
        """Records newest first, each with the cursor that goes on after it.

        Args:
            created_after, created_before: the first moment of the wanted ones, and the first one
                too late; both know their time zone.
        Raises: InvalidCursorError.
        """
        if cursor is not None and not _CURSOR.fullmatch(cursor):
            raise InvalidCursorError("the cursor is not one that a page of jobs gave")
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
                if raw is not None:
                    yield member.decode(), JobRecord.model_validate_json(raw)
            after = b"(" + members[-1]

    def _mirror(self, job_id: str) -> JobRecord:
        return JobRecord.model_validate_json(self._store.read(_mirror_key(job_id)))

    def _read(self, pipe: Pipeline, job_id: str) -> JobRecord | None:
        raw = cast("bytes | None", pipe.get(_record_key(job_id)))
        return None if raw is None else JobRecord.model_validate_json(raw)

    def _write(self, pipe: Pipeline, record: JobRecord) -> None:
        pipe.set(_record_key(record.id), record.model_dump_json())
        if record.deleted:
            self._hide(pipe, record)
            return
        member = _member(record)
        pipe.zadd(INDEX, {member: 0})
        if record.owner is not None:
            pipe.zadd(_owner_key(record.owner), {member: 0})
        if record.state in FINAL_STATES:
            pipe.srem(ACTIVE, record.id)
            pipe.delete(_parts_key(record.id), trials_key(record.id))
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


def _member(record: JobRecord) -> str:
    """Its place in the indices: they are in the order of these."""
    return f"{_microseconds(record.created_at)}-{record.id}"


def _microseconds(moment: datetime) -> str:
    """A moment since 1970 so that the order of the texts is that of the moments."""
    return f"{max(0, int(moment.timestamp() * 1e6)):016x}"


def _record_key(job_id: str) -> str:
    return f"cwpo:job:{job_id}"


def _parts_key(job_id: str) -> str:
    return f"cwpo:job:{job_id}:parts"


def _owner_key(owner: str) -> str:
    return f"{INDEX}:of:{owner}"


def _mirror_key(job_id: str) -> str:
    return f"jobs/{job_id}/job.json"
