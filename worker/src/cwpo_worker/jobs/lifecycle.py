"""The states of a job: each change of state, with the tasks that it requires."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta

import redis

from cwpo.types import FINAL_STATES, JobProgress, JobState, JobWait, ModelRef
from cwpo_worker.errors import IllegalTransitionError, JobStoppedError
from cwpo_worker.jobs.attempts import Attempts
from cwpo_worker.jobs.finished_shards import FinishedShards, RowCounts
from cwpo_worker.jobs.manifest import Manifest
from cwpo_worker.jobs.record import PLANNING_STATES, JobRecord, now
from cwpo_worker.jobs.registry import JobRegistry
from cwpo_worker.jobs.turns import Turns
from cwpo_worker.queue.task_queue import Census, Task, TaskQueue
from cwpo_worker.queue.totals import add_to_count, note_refused
from cwpo_worker.storage.store import BlobStore


class Lifecycle:
    """Changes the states of jobs, and queues the tasks that follow.

    Public for reading: `registry` (the records), `finished` (the finished shards), `queue` (the
    tasks) and `turns` (the shards that are not queued yet).

    Args:
        redis: a client that answers bytes (no decode_responses).
        store: where files, parts and results are.

    Methods may raise redis.RedisError, StoreError, and UnknownJobError for a job that is not there.
    """

    def __init__(self, redis: redis.Redis, store: BlobStore) -> None:
        self._redis = redis
        self._store = store
        self.registry = JobRegistry(redis, store)
        self.finished = FinishedShards(redis)
        self.queue = TaskQueue(redis)
        self.turns = Turns(redis, self.queue)

    def start(self, asked: JobRecord) -> JobRecord:
        """Create a job and queue its plan; returns the existing job if there is one with its id."""
        record = self.registry.create(asked)
        if record == asked:
            self.queue.enqueue(Task(record.id, "plan"))
        return record

    def expect(self, job_id: str, *states: JobState) -> JobRecord:
        """The job, if it is in one of the states. Raises: JobStoppedError if not."""
        return self.registry.expect(job_id, *states)

    def expect_planning(self, job_id: str, file: int) -> JobRecord:
        """The job, if this file of its input is not planned yet. Raises: JobStoppedError if not."""
        record = self.expect(job_id, *PLANNING_STATES)
        if record.is_planned or file < record.files_planned:
            raise JobStoppedError(f"file {file} of job {job_id} is planned")
        return record

    def note_planned(self, manifest: Manifest) -> None:
        """Let the shards that were planned have their turns, and queue the plan of the next file.

        In the midst of a plan, that is the shards alone. Repeating this does nothing.
        Raises: JobStoppedError when the job was cancelled.
        """
        job_id, is_news = manifest.job_id, False

        def planned(record: JobRecord) -> JobRecord:
            nonlocal is_news
            changed = record.with_planned(manifest)
            is_news = changed.files_planned != record.files_planned
            return changed

        record = self.registry.change(job_id, planned)
        self.turns.extend(job_id, record.shards or 0)
        self.turns.queue_next()
        if is_news and manifest.next_file is not None:
            self.queue.enqueue(Task(job_id, "plan", manifest.next_file))
        if self.has_finished(record):
            self.finalize(job_id)

    def has_finished(self, record: JobRecord) -> bool:
        """Whether all shards of the job are finished, and none is to come."""
        return record.is_planned and self.finished.count(record.id) == (record.shards or 0)

    def start_running(self, job_id: str) -> JobRecord:
        """Record that a shard has started.

        Returns: the job as it was then; the further steps of the shard compare it.
        Raises: JobStoppedError if it was cancelled.
        """
        record = self.expect(job_id, "queued", "running")
        if record.state == "queued":
            with suppress(IllegalTransitionError):
                self.registry.change(job_id, lambda job: job.moved("running", started_at=now()))
        return record

    def current(self, job: JobRecord) -> JobRecord:
        """The running job as it is now. Raises: JobStoppedError if its work was stopped."""
        record = self.expect(job.id, "running")
        record.check_continues(job)
        return record

    def pin_model(self, job: JobRecord, model: ModelRef) -> ModelRef:
        """The annotator of the job, which is that of its first answer.

        If it is this one, the job no longer waits for it.
        Raises: JobStoppedError if all rows are annotated anew.
        """

        def pinned(record: JobRecord) -> JobRecord:
            record.check_continues(job)
            pin = record.model or model
            waiting = None if pin.revision == model.revision else record.waiting
            return record.model_copy(update={"model": pin, "waiting": waiting})

        known = self.registry.get(job.id)
        if pinned(known) != known:
            known = self.registry.change(job.id, pinned)
        return known.model or model

    def wait_for_model(self, job_id: str, reason: str, limit: timedelta) -> None:
        """Record that a shard found no replica that hosts the job's annotator.

        If none has been found for longer than the limit, the job fails.
        """

        def waiting(record: JobRecord) -> JobRecord:
            if record.state != "running":
                return record
            wait = record.waiting or JobWait(since=now(), reason=reason)
            if now() - wait.since >= limit:
                error = _waited_too_long(record, wait)
                return record.moved("failed", error=error, progress=self.finished.progress(record))
            return record.model_copy(update={"waiting": wait})

        self.registry.change(job_id, waiting)

    def attempts(self, job_id: str, index: int) -> Attempts:
        """The attempts at the rows of a shard that began but never ended."""
        return Attempts(self._redis, job_id, index)

    def count_rows(self, counts: RowCounts) -> None:
        """Add the rows of a new part to the totals of the installation."""
        add_to_count(self._redis, "rows_annotated", counts.annotated)
        add_to_count(self._redis, "rows_failed", counts.failed)

    def note_refused(self, task: Task) -> None:
        """Count a task whose API key the service refused."""
        note_refused(self._redis, task.id)

    def finish_shard(self, job: JobRecord, index: int, counts: RowCounts) -> None:
        """Record that a shard is finished; after the last one, the merge is queued.

        Raises: JobStoppedError if all rows are annotated anew.
        """
        self.registry.get(job.id).check_continues(job)
        finished = self.finished.add(job.id, index, counts)
        # Read after that: the last file may just have been planned, when this was not finished yet.
        record = self.registry.get(job.id)
        if record.is_planned and finished == record.shards:
            self.finalize(job.id)

    def give_back(self, job_id: str, indices: Iterable[int]) -> None:
        """Let others have the shards that a task has not begun, when it is the job's turn."""
        self.turns.put_back(job_id, indices)
        self.turns.queue_next()

    def finalize(self, job_id: str) -> None:
        """Queue the merge of a job whose shards are all finished; repeating this does nothing."""
        with suppress(IllegalTransitionError):
            self.registry.change(job_id, lambda job: job.moved("finalizing"))
            self.queue.enqueue(Task(job_id, "merge"))

    def complete(self, job: JobRecord, progress: JobProgress) -> None:
        """End a merged job; does nothing if another run of the merge has done so.

        Raises: JobStoppedError if all rows are annotated anew.
        """
        state: JobState = "completed_with_errors" if progress.rows_failed else "completed"

        def completed(record: JobRecord) -> JobRecord:
            record.check_continues(job)
            return record.moved(state, progress=progress)

        with suppress(IllegalTransitionError):
            self.registry.change(job.id, completed)

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel the job, or do nothing if it is cancelled already.

        Raises: IllegalTransitionError if it has ended.
        """

        def cancelling(record: JobRecord) -> JobRecord:
            if record.state in ("cancelling", "cancelled"):
                return record
            if record.state in FINAL_STATES:
                raise IllegalTransitionError(
                    f"job {record.id} is {record.state}: it can no longer be cancelled"
                )
            return record.moved("cancelling")

        record = self.registry.change(job_id, cancelling)
        if record.state == "cancelling":
            record = self.settle(job_id, self.queue.census())
        return record

    def settle(self, job_id: str, census: Census) -> JobRecord:
        """Continue the cancellation of a job.

        Once none of its tasks is running, it is cancelled; if some of its shards are finished, they
        are merged first.
        """
        held = census.of(job_id)
        merge = Task(job_id, "merge")
        self.queue.remove(held & census.waiting - {merge})
        if merge in held or held & census.running:
            return self.registry.get(job_id)
        # After Redis was lost, the parts alone tell.
        folder = self.registry.get(job_id).folder
        if self.finished.count(job_id) or self._store.list(folder.parts):
            self.queue.enqueue(merge)
            return self.registry.get(job_id)
        return self._end_cancelled(job_id, error=None)

    def end_cancelled(self, job_id: str, progress: JobProgress, edition: int) -> None:
        """End a cancelled job whose finished shards were merged as that edition."""

        def cancelled(record: JobRecord) -> JobRecord:
            return record.moved("cancelled", progress=progress, edition=edition)

        with suppress(IllegalTransitionError):  # A twin of the merge was faster.
            self.registry.change(job_id, cancelled)

    def resume(self, job_id: str, *, repin: bool = False) -> JobRecord:
        """Plan a failed or cancelled job again; does nothing if it is under way.

        Args:
            repin: annotate all rows anew, by the annotator of the first answer from now on.
        Raises: IllegalTransitionError if it has completed, is still being cancelled, or would have
            to be pinned anew, and is under way or has a certificate of its annotator.
        """

        def resumed(record: JobRecord) -> JobRecord:
            if record.state in ("validating", "queued", "running", "finalizing"):
                if repin and record.model is not None:
                    raise IllegalTransitionError(
                        f"job {record.id} is {record.state}: cancel it before it is pinned to "
                        "another annotator"
                    )
                return record
            if record.state not in ("failed", "cancelled"):
                raise IllegalTransitionError(
                    f"job {record.id} is {record.state}: only a failed or cancelled job can "
                    "be resumed"
                )
            if repin and record.certificate is not None:
                raise IllegalTransitionError(
                    f"job {record.id} is certified by a certificate of its annotator: submit its "
                    "input anew for another one"
                )
            anew = {"model": None, "repins": record.repins + 1} if repin else {}
            return record.moved(
                "validating",
                **anew,
                progress=JobProgress(),
                files_planned=0,
                rows_planned=0,
                shards=None,
                rejected=0,
                error=None,
                edition=None,
                started_at=None,
                finished_at=None,
            )

        before = self.registry.get(job_id)
        record = self.registry.change(job_id, resumed)
        if record.version != before.version:
            self.queue.enqueue(Task(job_id, "plan"))
        return record

    def give_up(self, task: Task, reason: str) -> None:
        """End the job of a task that cannot be done, as failed unless it is being cancelled."""
        if task.step == "merge" and self.registry.get(task.job_id).state == "cancelling":
            self._end_cancelled(
                task.job_id, error=f"what was finished cannot be published: {reason}"
            )
        else:
            self.fail(task.job_id, reason)

    def fail(self, job_id: str, reason: str) -> None:
        """End the job as failed, unless it is being cancelled or has ended."""

        def failed(record: JobRecord) -> JobRecord:
            if record.state in FINAL_STATES or record.state == "cancelling":
                return record
            return record.moved("failed", error=reason, progress=self.finished.progress(record))

        self.registry.change(job_id, failed)

    def delete(self, job_id: str) -> JobRecord:
        """Hide an ended job; its blobs are removed soon after.

        Returns: the deleted job. Raises: IllegalTransitionError if it has not ended.
        """

        def deleted(record: JobRecord) -> JobRecord:
            if record.state not in FINAL_STATES:
                raise IllegalTransitionError(
                    f"job {record.id} is {record.state}: it can be deleted once it has ended"
                )
            return record.model_copy(update={"deleted": True})

        return self.registry.change(job_id, deleted)

    def _end_cancelled(self, job_id: str, *, error: str | None) -> JobRecord:
        def cancelled(record: JobRecord) -> JobRecord:
            if record.state != "cancelling":
                return record
            progress = self.finished.progress(record)
            return record.moved("cancelled", progress=progress, error=error)

        return self.registry.change(job_id, cancelled)


def _waited_too_long(record: JobRecord, wait: JobWait) -> str:
    wanted = "" if record.model is None else f" {record.model.name} {record.model.revision}"
    return (
        f"no replica of the service has hosted the job's annotator{wanted} for "
        f"{(now() - wait.since).total_seconds():,.0f} s (--model-wait): {wait.reason}; resume the "
        "job once one does, or have all rows annotated anew by another one with "
        f"`cwpo jobs resume {record.id} --repin`"
    )
