"""Jobs as the service sees them: submit, look at, list, cancel, resume, fetch."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import BinaryIO

import redis
from redis.lock import Lock

from cwpo.types import (
    FINAL_STATES,
    File,
    Job,
    JobList,
    JobProgress,
    JobRequest,
    JobState,
    ResultFormat,
)
from cwpo_worker import activity, ids
from cwpo_worker.activity import Activity
from cwpo_worker.connection import queue_errors
from cwpo_worker.errors import (
    FileInUseError,
    IdempotencyConflictError,
    IllegalTransitionError,
    InputRefusedError,
    UnknownJobError,
)
from cwpo_worker.files import FileCatalog
from cwpo_worker.inputs import Input, InputPrefix
from cwpo_worker.job import JobRecord, now
from cwpo_worker.manifest import JobFolder
from cwpo_worker.queue import Census, Task, TaskQueue
from cwpo_worker.records import PartCounts, Records
from cwpo_worker.store import BlobStore

SHARD_ROWS = 2048
_HOLD_SECONDS = 30.0


class Ledger:
    """All jobs.

    Args:
        redis: a client that answers bytes (no decode_responses).
        store: where files, parts and results are.
        inputs: where jobs may name inputs that were not uploaded; None for nowhere.

    An owner is the name of an API key and sees its own jobs; owner None sees everybody's. Every
    method raises QueueUnavailableError when Redis cannot be used.
    """

    def __init__(
        self, redis: redis.Redis, store: BlobStore, inputs: InputPrefix | None = None
    ) -> None:
        self.redis = redis
        self.store = store
        self.inputs = inputs
        self.files = FileCatalog(store)
        self.records = Records(redis, store)
        self.queue = TaskQueue(redis)

    def submit(self, request: JobRequest, *, owner: str | None, idempotency_key: str | None) -> Job:
        """Start a job, or give the one that the same key of the same owner has started.

        Raises: UnknownFileError; InputRefusedError; DatasetError for an input of no known format;
        IdempotencyConflictError if the key was used for another request.
        """
        found = self._find_input(request, owner)
        asked = JobRecord(
            id=ids.make("job", owner, idempotency_key),
            state="validating",
            file_id=request.file_id,
            input=request.input,
            input_url=found and found.url,
            input_version=found and found.version,
            truncation=request.truncation,
            max_rejected_share=request.max_rejected_share,
            created_at=now(),
            owner=owner,
            shard_rows=SHARD_ROWS,
        )
        with queue_errors(), self._holding(request.file_id or request.input or ""):
            self._find_input(request, owner)  # It may have been deleted since.
            record = self.records.create(asked)
            if record.deleted or any(getattr(record, name) != value for name, value in request):
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

    def versioned(self, job_id: str, *, owner: str | None) -> tuple[int, Job]:
        """The job as it is, after how many changes of its record. Raises: as get does."""
        with queue_errors():
            record = self._owned(job_id, owner)
            return record.version, self._public(record)

    def list(
        self,
        *,
        owner: str | None,
        state: JobState | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int,
        cursor: str | None = None,
    ) -> JobList:
        """One page of jobs, newest first, of jobs created within the bounds (see Records.newest).

        Raises: InvalidCursorError.
        """
        jobs: list[Job] = []
        last = None
        with queue_errors():
            for place, record in self.records.newest(owner, cursor, created_after, created_before):
                if state is not None and record.state != state:
                    continue
                if len(jobs) == limit:
                    return JobList(jobs=jobs, next_cursor=last)
                jobs.append(self._public(record))
                last = place
        return JobList(jobs=jobs)

    def activity(self) -> Activity:
        """What goes on: every owner's jobs, and all tasks."""
        with queue_errors():
            waiting, delayed, running = self.queue.lengths()
            return Activity(
                jobs=Counter(self.records.active_states().values()),
                waiting=waiting,
                delayed=delayed,
                running=running,
                waited_seconds=self.queue.waited_seconds(),
                totals=activity.totals(self.redis),
            )

    def cancel(self, job_id: str, *, owner: str | None) -> Job:
        """Stop the job; again for one that is cancelled already.

        What is finished is kept, and becomes the job's results.
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
                "validating",
                progress=JobProgress(),
                error=None,
                edition=None,
                started_at=None,
                finished_at=None,
            )

        with queue_errors():
            before = self._owned(job_id, owner)
            record = self.records.change(job_id, resumed)
            if record.version != before.version:
                self.queue.enqueue([Task(job_id, "plan")])
            return self._public(record)

    def delete(self, job_id: str, *, owner: str | None) -> Job:
        """Forget an ended job with its results: at once for everybody, in the store soon after.

        Returns: what it was. Raises: UnknownJobError; IllegalTransitionError if it has not ended.
        """

        def deleted(record: JobRecord) -> JobRecord:
            if record.state not in FINAL_STATES:
                raise IllegalTransitionError(
                    f"job {record.id} is {record.state}: it can be deleted when it has ended"
                )
            return record.model_copy(update={"deleted": True})

        with queue_errors():
            self._owned(job_id, owner)
            return self.records.change(job_id, deleted).public()

    def delete_file(self, file_id: str, *, owner: str | None) -> File:
        """Remove an uploaded file.

        Returns: what it was. Raises: UnknownFileError; FileInUseError while a job needs it.
        """
        file = self.files.get(file_id, owner=owner)
        with queue_errors(), self._holding(file_id):
            for job_id in self.records.active():
                with suppress(UnknownJobError):
                    if self.records.get(job_id).file_id == file_id:
                        raise FileInUseError(
                            f"file {file_id} is needed by job {job_id}, which has not ended"
                        )
            self.files.delete(file_id)
            return file

    def settle(self, job_id: str, census: Census) -> JobRecord:
        """Take a cancelling job nearer to its end.

        Once none of its tasks is running it is cancelled, or merged first where some of its shards
        are finished.
        """
        held = census.of(job_id)
        merge = Task(job_id, "merge")
        self.queue.remove(held & census.waiting - {merge})
        if merge in held or held & census.running:
            return self.records.get(job_id)
        if self.store.list(JobFolder(job_id).parts):
            self.queue.enqueue([merge])
            return self.records.get(job_id)
        return self._end_cancelled(job_id, None)

    def give_up(self, task: Task, reason: str) -> None:
        """End the job of a task that cannot be done: as failed, unless it was being cancelled."""
        if task.step == "merge" and self.records.get(task.job_id).state == "cancelling":
            self._end_cancelled(task.job_id, f"what was finished cannot be published: {reason}")
        else:
            self.records.fail(task.job_id, reason)

    def _end_cancelled(self, job_id: str, error: str | None) -> JobRecord:
        def cancelled(record: JobRecord) -> JobRecord:
            if record.state != "cancelling":
                return record
            progress = self.records.progress(record)
            return record.moved("cancelled", progress=progress, error=error)

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
        """The weighted dataset, seekable, and its bytes; of a cancelled job, what it finished.

        Raises: UnknownJobError; IllegalTransitionError if the job has not completed.
        """
        return self._open(self._ended(job_id, owner).results(format))

    def open_errors(self, job_id: str, *, owner: str | None) -> tuple[BinaryIO, int]:
        """The rejected rows with their reasons, as JSONL; raises as open_results does."""
        return self._open(self._ended(job_id, owner).errors)

    def check(self) -> None:
        """Raises: QueueUnavailableError when Redis does not answer."""
        with queue_errors():
            self.redis.ping()

    def _find_input(self, request: JobRequest, owner: str | None) -> Input | None:
        """The input that was not uploaded, None for one that was; raises as submit does."""
        if request.file_id is not None:
            self.files.get(request.file_id, owner=owner)
            return None
        if self.inputs is None:
            raise InputRefusedError(
                "this service takes uploaded files only: its operator has set no --input-prefix"
            )
        return self.inputs.find(request.input or "")

    def _holding(self, file_id: str) -> Lock:
        """While it is held, no job begins to use the file and nobody deletes it."""
        lock: Lock = self.redis.lock(
            f"cwpo:file:{file_id}", timeout=_HOLD_SECONDS, blocking_timeout=_HOLD_SECONDS
        )
        return lock

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

    def _ended(self, job_id: str, owner: str | None) -> JobFolder:
        with queue_errors():
            record = self._owned(job_id, owner)
        is_complete = record.state in ("completed", "completed_with_errors")
        if not is_complete and record.edition is None:
            when = "" if record.state in FINAL_STATES else " yet"
            raise IllegalTransitionError(f"job {job_id} is {record.state}: it has no results{when}")
        return JobFolder(job_id, record.edition)

    def _open(self, key: str) -> tuple[BinaryIO, int]:
        return self.store.open(key), self.store.size(key)
