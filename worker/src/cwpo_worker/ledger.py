"""Jobs as the service sees them: submit, look at, list, cancel, resume, fetch."""

from __future__ import annotations

from contextlib import suppress
from typing import BinaryIO

import redis

from cwpo.types import (
    FINAL_STATES,
    Job,
    JobList,
    JobProgress,
    JobRequest,
    JobState,
    ResultFormat,
)
from cwpo_worker import ids
from cwpo_worker.connection import queue_errors
from cwpo_worker.errors import (
    IdempotencyConflictError,
    IllegalTransitionError,
    UnknownJobError,
)
from cwpo_worker.files import FileCatalog
from cwpo_worker.job import JobRecord, now
from cwpo_worker.manifest import JobFolder
from cwpo_worker.queue import Census, Task, TaskQueue
from cwpo_worker.records import PartCounts, Records
from cwpo_worker.store import BlobStore

SHARD_ROWS = 2048


class Ledger:
    """All jobs.

    Args:
        redis: a client that answers bytes (no decode_responses).
        store: where files, parts and results are.

    An owner is the name of an API key and sees its own jobs; owner None sees everybody's. Every
    method raises QueueUnavailableError when Redis cannot be used.
    """

    def __init__(self, redis: redis.Redis, store: BlobStore) -> None:
        self.redis = redis
        self.store = store
        self.files = FileCatalog(store)
        self.records = Records(redis, store)
        self.queue = TaskQueue(redis)

    def submit(self, request: JobRequest, *, owner: str | None, idempotency_key: str | None) -> Job:
        """Start a job, or give the one that the same key of the same owner has started.

        Raises: UnknownFileError; IdempotencyConflictError if the key was used for another request.
        """
        self.files.get(request.file_id, owner=owner)
        asked = JobRecord(
            id=ids.make("job", owner, idempotency_key),
            state="validating",
            file_id=request.file_id,
            truncation=request.truncation,
            max_rejected_share=request.max_rejected_share,
            created_at=now(),
            owner=owner,
            shard_rows=SHARD_ROWS,
        )
        with queue_errors():
            record = self.records.create(asked)
            if any(getattr(record, name) != value for name, value in request):
                raise IdempotencyConflictError(
                    "this Idempotency-Key was used for another job: send a new one"
                )
            if record == asked:
                self.queue.enqueue([Task(record.id, "plan")])
            return self._public(record)

    def get(self, job_id: str, *, owner: str | None) -> Job:
        """The job as it is. Raises: UnknownJobError, also if it is another owner's."""
        with queue_errors():
            return self._public(self._owned(job_id, owner))

    def list(
        self, *, owner: str | None, state: JobState | None, limit: int, cursor: str | None
    ) -> JobList:
        """One page of jobs, newest first. Raises: InvalidCursorError."""
        jobs: list[Job] = []
        last = None
        with queue_errors():
            for place, record in self.records.newest(owner, cursor):
                if state is not None and record.state != state:
                    continue
                if len(jobs) == limit:
                    return JobList(jobs=jobs, next_cursor=last)
                jobs.append(self._public(record))
                last = place
        return JobList(jobs=jobs)

    def cancel(self, job_id: str, *, owner: str | None) -> Job:
        """Stop the job; again for one that is cancelled already.

        Raises: UnknownJobError; IllegalTransitionError if it has ended or is being merged.
        """

        def cancelling(record: JobRecord) -> JobRecord:
            if record.state in ("cancelling", "cancelled"):
                return record
            if record.state in FINAL_STATES or record.state == "finalizing":
                raise IllegalTransitionError(
                    f"job {record.id} is {record.state}: it can no longer be cancelled"
                )
            return record.moved("cancelling")

        with queue_errors():
            self._owned(job_id, owner)
            record = self.records.change(job_id, cancelling)
            if record.state == "cancelling":
                record = self.settle(job_id, self.queue.census())
            return self._public(record)

    def resume(self, job_id: str, *, owner: str | None) -> Job:
        """Go on with a failed or cancelled job: only what is missing is done.

        A job that is under way stays as it is. Raises: UnknownJobError; IllegalTransitionError if
        it has completed, or is still being cancelled.
        """

        def resumed(record: JobRecord) -> JobRecord:
            if record.state in ("validating", "queued", "running", "finalizing"):
                return record
            if record.state not in ("failed", "cancelled"):
                raise IllegalTransitionError(
                    f"job {record.id} is {record.state}: only a failed or cancelled one is resumed"
                )
            return record.moved(
                "validating", progress=JobProgress(), error=None, started_at=None, finished_at=None
            )

        with queue_errors():
            before = self._owned(job_id, owner)
            record = self.records.change(job_id, resumed)
            if record.version != before.version:
                self.queue.enqueue([Task(job_id, "plan")])
            return self._public(record)

    def settle(self, job_id: str, census: Census) -> JobRecord:
        """Call a cancelling job cancelled once none of its tasks is running."""
        self.queue.remove(task for task in census.waiting if task.job_id == job_id)
        is_running = any(task.job_id == job_id for task in census.running)

        def cancelled(record: JobRecord) -> JobRecord:
            if record.state != "cancelling" or is_running:
                return record
            return record.moved("cancelled", progress=self.records.progress(record))

        return self.records.change(job_id, cancelled)

    def finish_part(self, job_id: str, index: int, counts: PartCounts) -> None:
        """Note that a shard is finished; the last one lets the merge begin."""
        self.records.set_part(job_id, index, counts)
        if self.records.parts_done(job_id) == self.records.get(job_id).shards:
            self.finalize(job_id)

    def finalize(self, job_id: str) -> None:
        """Queue the merge of a job whose shards are all finished; a no-op the second time."""
        with suppress(IllegalTransitionError):
            self.records.move(job_id, "finalizing")
            self.queue.enqueue([Task(job_id, "merge")])

    def open_results(
        self, job_id: str, format: ResultFormat, *, owner: str | None
    ) -> tuple[BinaryIO, int]:
        """The weighted dataset, seekable, and its bytes.

        Raises: UnknownJobError; IllegalTransitionError if the job has not completed.
        """
        return self._open(job_id, JobFolder(job_id).results(format), owner)

    def open_errors(self, job_id: str, *, owner: str | None) -> tuple[BinaryIO, int]:
        """The rejected rows with their reasons, as JSONL; raises as open_results does."""
        return self._open(job_id, JobFolder(job_id).errors, owner)

    def check(self) -> None:
        """Raises: QueueUnavailableError when Redis does not answer."""
        with queue_errors():
            self.redis.ping()

    def _owned(self, job_id: str, owner: str | None) -> JobRecord:
        if not ids.is_valid("job", job_id):
            raise UnknownJobError(f"there is no job {job_id[:64]!r}")
        record = self.records.get(job_id)
        if owner is not None and record.owner != owner:
            raise UnknownJobError(f"there is no job {job_id}")
        return record

    def _public(self, record: JobRecord) -> Job:
        progress = self.records.progress(record)
        return record.model_copy(update={"progress": progress}).public()

    def _open(self, job_id: str, key: str, owner: str | None) -> tuple[BinaryIO, int]:
        with queue_errors():
            record = self._owned(job_id, owner)
        if record.state not in ("completed", "completed_with_errors"):
            when = "" if record.state in FINAL_STATES else " yet"
            raise IllegalTransitionError(f"job {job_id} is {record.state}: it has no results{when}")
        return self.store.open(key), self.store.size(key)
