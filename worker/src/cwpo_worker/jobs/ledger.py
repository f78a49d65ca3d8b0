"""The operations of owners on their jobs: submit, get, list, cancel, resume, delete, download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime

import redis
from redis.lock import Lock

from cwpo.types import (
    FINAL_STATES,
    Certificate,
    DatasetParts,
    File,
    Job,
    JobList,
    JobRequest,
    JobState,
    ModelRef,
    ResultFormat,
)
from cwpo_worker import ids
from cwpo_worker.errors import (
    DamagedRecordError,
    FileInUseError,
    IdempotencyConflictError,
    IllegalTransitionError,
    InputRefusedError,
    QueueUnavailableError,
    UnknownJobError,
    WaitingRowsError,
)
from cwpo_worker.jobs.confidences import DatasetConfidences
from cwpo_worker.jobs.dataset import Dataset
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.jobs.manifest import JobFolder
from cwpo_worker.jobs.record import JobRecord, now
from cwpo_worker.queue.connection import queue_errors
from cwpo_worker.queue.totals import (
    RECONCILED_SECONDS,
    Totals,
    count_refused,
    is_reconciled,
    read_counts,
)
from cwpo_worker.storage.inputs import INPUTS, Input, InputPrefix
from cwpo_worker.storage.store import BlobStore, StoredBlob
from cwpo_worker.storage.uploads import FileCatalog

# A shard is what a worker orders by prompt: rows of one prompt that lie further apart in the input
# are not read together.
SHARD_ROWS = 4096
_HOLD_SECONDS = 30.0


class Ledger:
    """All jobs.

    Args:
        redis, store: those of the lifecycle.
        files: the uploaded files.
        inputs: where jobs may name inputs that were not uploaded; None for nowhere.
        max_waiting_rows: number of rows of an owner's planned jobs from which on it may submit no
            further job; None for no limit.

    An owner is the name of an API key and sees its own jobs; owner None sees everybody's. Every
    method raises QueueUnavailableError when Redis cannot be used.
    """

    def __init__(
        self,
        redis: redis.Redis,
        store: BlobStore,
        lifecycle: Lifecycle,
        files: FileCatalog,
        inputs: InputPrefix | None = None,
        max_waiting_rows: int | None = None,
    ) -> None:
        self._redis = redis
        self._store = store
        self._inputs = inputs
        self._max_waiting_rows = max_waiting_rows
        self._files = files
        self._lifecycle = lifecycle
        self._registry = lifecycle.registry
        self._finished = lifecycle.finished
        self._queue = lifecycle.queue

    def submit(
        self,
        request: JobRequest,
        *,
        owner: str | None,
        idempotency_key: str | None,
        certified_by: tuple[ModelRef, Certificate] | None = None,
    ) -> Job:
        """Start a job, or return the job that this owner started with the same idempotency key.

        Args:
            certified_by: with max_error, the annotator of all rows and its certificate.
        Raises: UnknownFileError; InputRefusedError; DatasetError for an input of no known format;
        IdempotencyConflictError if the key was used for another request; WaitingRowsError.
        """
        found = self._find_inputs(request)
        only = found[0] if request.input is not None else None
        asked = JobRecord(
            id=ids.make("job", owner, idempotency_key),
            state="validating",
            file_id=request.file_id,
            file_ids=request.file_ids,
            input=request.input,
            prefix=request.prefix,
            input_url=None if only is None else only.url,
            input_version=None if only is None else only.version,
            truncation=request.truncation,
            max_rejected_share=request.max_rejected_share,
            priority=request.priority,
            merge=request.merge,
            pairs=request.pairs,
            max_error=request.max_error,
            model=None if certified_by is None else certified_by[0],
            certificate=None if certified_by is None else certified_by[1],
            created_at=now(),
            owner=owner,
            shard_rows=SHARD_ROWS,
        )
        with queue_errors(), self._holding(asked.files):
            for file_id in asked.files:
                self._files.get(file_id, owner=owner)
            if request.prefix is not None:
                with self._store.create(JobFolder(asked.id).inputs) as blob:
                    blob.write(INPUTS.dump_json(found))
            if owner is not None and not self._registry.exists(asked.id):
                self._check_waiting_rows(owner)
            record = self._lifecycle.start(asked)
            if record.deleted or any(getattr(record, name) != value for name, value in request):
                raise IdempotencyConflictError(
                    "this Idempotency-Key was used for another job: send a new one"
                )
            return self._public(record)

    def get(self, job_id: str, *, owner: str | None) -> Job:
        """The job in its current state. Raises: UnknownJobError, also for another owner's job."""
        with queue_errors():
            return self._public(self._owned(job_id, owner))

    def versioned(self, job_id: str, *, owner: str | None) -> tuple[int, Job]:
        """The number of changes of the job's record, and the job. Raises: as get does."""
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
        """One page of jobs, newest first.

        Args:
            created_after, created_before: times with a time zone; the first is inclusive, the
                second exclusive.
            limit: maximum number of jobs per page.
            cursor: the `next_cursor` of the previous page.
        Raises: InvalidCursorError.
        """
        jobs: list[Job] = []
        last = None
        with queue_errors():
            newest = self._registry.newest(owner, cursor, created_after, created_before)
            for place, record in newest:
                if state is not None and record.state != state:
                    continue
                if len(jobs) == limit:
                    return JobList(jobs=jobs, next_cursor=last)
                jobs.append(self._public(record))
                last = place
        return JobList(jobs=jobs)

    def totals(self) -> Totals:
        """The numbers of jobs and tasks of all owners."""
        with queue_errors():
            waiting, delayed, running = self._queue.lengths()
            active = self._registry.active_records().values()
            return Totals(
                jobs=Counter(record.state for record in active),
                waiting_for_model=sum(record.waiting is not None for record in active),
                waiting=waiting,
                delayed=delayed,
                running=running,
                unqueued=self._lifecycle.turns.tasks_left(),
                waited_seconds=self._queue.waited_seconds(),
                refused=count_refused(self._redis),
                workers=self._queue.workers(),
                is_reconciled=is_reconciled(self._redis),
                counts=read_counts(self._redis),
            )

    def cancel(self, job_id: str, *, owner: str | None) -> Job:
        """Cancel the job; does nothing if it is being cancelled already.

        Finished shards become the job's results.
        Raises: UnknownJobError; IllegalTransitionError if it has ended.
        """
        with queue_errors():
            self._owned(job_id, owner)
            return self._public(self._lifecycle.cancel(job_id))

    def resume(self, job_id: str, *, owner: str | None, repin: bool = False) -> Job:
        """Resume a failed or cancelled job; only missing shards are annotated.

        Does nothing if the job is under way.

        Args:
            repin: annotate all rows anew, by the annotator of the first answer from now on.
        Raises: UnknownJobError; IllegalTransitionError if it has completed, is still being
            cancelled, or is under way and would have to be pinned anew.
        """
        with queue_errors():
            self._owned(job_id, owner)
            return self._public(self._lifecycle.resume(job_id, repin=repin))

    def delete(self, job_id: str, *, owner: str | None) -> Job:
        """Delete an ended job with its results: it disappears at once, its blobs are removed soon.

        Returns: the deleted job.
        Raises: UnknownJobError; IllegalTransitionError if it has not ended.
        """
        with queue_errors():
            self._owned(job_id, owner)
            return self._lifecycle.delete(job_id).public()

    def delete_file(self, file_id: str, *, owner: str | None) -> File:
        """Delete an uploaded file.

        Returns: the deleted file. Raises: UnknownFileError; FileInUseError while a job needs it.
        """
        file = self._files.get(file_id, owner=owner)
        with queue_errors(), self._holding([file_id]):
            for job_id in self._registry.active():
                with suppress(UnknownJobError, DamagedRecordError):
                    if file_id in self._registry.get(job_id).files:
                        raise FileInUseError(
                            f"file {file_id} is needed by job {job_id}, which has not ended"
                        )
            self._files.delete(file_id)
            return file

    def open_results(self, job_id: str, format: ResultFormat, *, owner: str | None) -> StoredBlob:
        """The weighted dataset as a single file; for a cancelled job it holds the finished shards.

        Raises: UnknownJobError; IllegalTransitionError if the job has not completed;
        DatasetFormError if its dataset is a folder of parts only.
        """
        return self.dataset(job_id, owner=owner).open_merged(job_id, format)

    def dataset(self, job_id: str, *, owner: str | None) -> Dataset:
        """The dataset; for a cancelled job, of its finished shards.

        Raises: UnknownJobError; IllegalTransitionError if the job has not completed.
        """
        return Dataset(self._store, self._ended(job_id, owner))

    def parts(
        self,
        job_id: str,
        *,
        owner: str | None,
        cursor: str | None = None,
        url_seconds: int | None = None,
    ) -> DatasetParts:
        """A page of the dataset's parts; for a cancelled job, of its finished shards.

        Args:
            cursor: the `next_cursor` of the previous page.
            url_seconds: how long presigned URLs are valid; None for no such URLs.
        Raises: UnknownJobError; IllegalTransitionError if the job has not completed;
        InvalidCursorError; DatasetFormError for a job of an earlier version.
        """
        return self.dataset(job_id, owner=owner).parts(cursor, url_seconds)

    def confidences(self, job_id: str, *, owner: str | None) -> DatasetConfidences:
        """How the confidences of the dataset are distributed, and the rows at the ends.

        Raises: UnknownJobError; IllegalTransitionError if the job has not completed;
        DatasetFormError for a job of an earlier version.
        """
        return self.dataset(job_id, owner=owner).confidences()

    def open_part(self, job_id: str, name: str, *, owner: str | None) -> StoredBlob:
        """A part by its name. Raises: UnknownPartError; otherwise as parts."""
        return self.dataset(job_id, owner=owner).open(name)

    def open_errors(self, job_id: str, *, owner: str | None) -> StoredBlob:
        """The rejected rows with their reasons, as JSONL; every dataset has this file.

        Raises: UnknownJobError; IllegalTransitionError if the job has not completed.
        """
        return self._store.stored(self._ended(job_id, owner).errors)

    def check(self) -> None:
        """Raises: QueueUnavailableError if Redis does not answer, or no worker is running."""
        with queue_errors():
            if not is_reconciled(self._redis):
                raise QueueUnavailableError(
                    f"no worker has been running for {RECONCILED_SECONDS} s: start `cwpo worker`"
                )

    def _find_inputs(self, request: JobRequest) -> tuple[Input, ...]:
        """The inputs that were not uploaded; raises as submit does."""
        if request.input is None and request.prefix is None:
            return ()
        if self._inputs is None:
            raise InputRefusedError(
                "this service takes uploaded files only: its operator has set no --input-prefix"
            )
        if request.input is not None:
            return (self._inputs.find(request.input),)
        return self._inputs.find_all(request.prefix or "")

    def _check_waiting_rows(self, owner: str) -> None:
        if self._max_waiting_rows is None:
            return
        waiting = sum(
            record.rows_known - self._finished.progress(record).rows_done
            for record in self._active(owner)
        )
        if waiting >= self._max_waiting_rows:
            raise WaitingRowsError(
                f"{waiting:,} rows of jobs of the API key {owner} are waiting, which is over its "
                f"limit of {self._max_waiting_rows:,}: submit the job once some of them are done"
            )

    def _active(self, owner: str) -> Iterator[JobRecord]:
        for job_id in self._registry.active():
            with suppress(UnknownJobError, DamagedRecordError):
                record = self._registry.get(job_id)
                if record.owner == owner:
                    yield record

    @contextmanager
    def _holding(self, files: Iterable[str]) -> Iterator[None]:
        """Locks; while they are held, no job starts to use the files, and none is deleted."""
        with ExitStack() as locks:
            # In one order for all, so that no two wait for each other.
            for file_id in sorted(set(files)):
                lock: Lock = self._redis.lock(
                    f"cwpo:file:{file_id}", timeout=_HOLD_SECONDS, blocking_timeout=_HOLD_SECONDS
                )
                locks.enter_context(lock)
            yield

    def _owned(self, job_id: str, owner: str | None) -> JobRecord:
        if not ids.is_valid("job", job_id):
            raise UnknownJobError(f"there is no job {job_id[:64]!r}")
        record = self._registry.get(job_id)
        if owner is not None and record.owner != owner:
            raise UnknownJobError(f"there is no job {job_id}")
        return record

    def _public(self, record: JobRecord) -> Job:
        progress = self._finished.progress(record)
        return record.model_copy(update={"progress": progress}).public()

    def _ended(self, job_id: str, owner: str | None) -> JobFolder:
        with queue_errors():
            record = self._owned(job_id, owner)
        is_complete = record.state in ("completed", "completed_with_errors")
        if not is_complete and record.edition is None:
            when = "" if record.state in FINAL_STATES else " yet"
            raise IllegalTransitionError(f"job {job_id} is {record.state}: it has no results{when}")
        return record.folder
