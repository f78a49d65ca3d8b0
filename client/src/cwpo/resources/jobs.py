"""Batch jobs: /jobs and the paths below it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from http import HTTPStatus
from pathlib import Path

from pydantic import ValidationError

from cwpo.connection import AsyncConnection, Connection
from cwpo.datasets.folder import DatasetFolder
from cwpo.errors import CwpoError, JobFailedError, mistake_in
from cwpo.events import JobEvents
from cwpo.progress import Progress
from cwpo.transport import Call, Request
from cwpo.types import (
    FINAL_STATES,
    MAX_REJECTED_SHARE,
    DatasetPart,
    DatasetParts,
    Job,
    JobList,
    JobRequest,
    JobState,
    Merge,
    Pairs,
    Priority,
    ResultFormat,
    Truncation,
)

PARTS_AT_ONCE = 4


class Jobs:
    """Batch jobs, as `client.jobs`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        file_id: str | None = None,
        *,
        file_ids: Sequence[str] | None = None,
        input: str | None = None,
        prefix: str | None = None,
        truncation: Truncation = "error",
        max_rejected_share: float = MAX_REJECTED_SHARE,
        priority: Priority = "batch",
        merge: Merge = "auto",
        pairs: Pairs | None = None,
        max_error: float | None = None,
    ) -> Job:
        """Submit a job for an uploaded file, or for the path of an input below --input-prefix.

        Args:
            file_ids: several uploaded files instead, which are annotated as one, in this order.
            prefix: path of a folder below --input-prefix instead, whose files are taken as one.
            truncation: treatment of texts that are too long for the annotator: "error" rejects
                the row, "prompt_left" drops the oldest tokens of the prompt.
            max_rejected_share: share of invalid rows, 0 to 1, above which the job fails early.
            priority: "interactive" puts the job before the other jobs of the same API key.
            merge: "auto" makes the dataset one file too unless it is large, "never" does not.
            pairs: pairs for each row that has a list of responses: "best_worst" of them,
                "adjacent" ones in the ranking, or "all"; without it, such rows are rejected.
            max_error: adds the column certified, true above the threshold of the annotator's
                certificate of this max_error, which it has to have.
        """
        options = (truncation, max_rejected_share, priority, merge, pairs, max_error)
        return self._connection.send(_create(file_id, file_ids, input, prefix, *options))

    def list(
        self,
        *,
        state: JobState | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobList:
        """One page of jobs, newest first; a time without a time zone is local time.

        Args:
            created_after: only jobs created then or later.
            created_before: only jobs created earlier than this.
            limit: maximum number of jobs per page.
            cursor: next_cursor of the previous page.
        """
        created = (created_after, created_before)
        return self._connection.send(_list(state, created, limit, cursor))

    def get(self, job_id: str) -> Job:
        """The job in its current state."""
        return self._connection.send(_get(job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel the job; its finished rows can be downloaded, and the rest resumed later."""
        return self._connection.send(_cancel(job_id))

    def resume(self, job_id: str, *, repin: bool = False) -> Job:
        """Resume a failed or cancelled job; finished rows are not annotated again.

        Args:
            repin: annotate all rows anew, by the annotator that the service hosts from now on;
                otherwise the job waits until its own is hosted.
        """
        return self._connection.send(_resume(job_id, repin))

    def delete(self, job_id: str) -> Job:
        """Delete an ended job with its results, and return it. Its input file stays.

        Raises: ConflictError if it has not ended.
        """
        return self._connection.send(_delete(job_id))

    def watch(self, job_id: str, *, poll_seconds: float = 0.5) -> Iterator[Job]:
        """Poll the job every `poll_seconds`; yields it each time, until it has ended."""
        while True:
            job = self.get(job_id)
            yield job
            if job.state in FINAL_STATES:
                return
            self._connection.sleep(poll_seconds)

    def events(self, job_id: str) -> Iterator[Job]:
        """Yield the job now and after each change until it has ended, without polling.

        After a lost connection it reconnects, and continues where it stopped.
        """
        events = JobEvents(job_id, self._connection.max_retries)
        while True:
            failure = None
            try:
                with self._connection.stream(events.request()) as response:
                    if response.status_code == HTTPStatus.NO_CONTENT:
                        return
                    for line in response.iter_lines():
                        job = events.feed(line)
                        if job is not None:
                            yield job
                        if events.ended:
                            return
            except CwpoError as error:
                failure = error
            self._connection.sleep(events.delay(failure))

    def wait(self, job_id: str, *, poll_seconds: float = 0.5) -> Job:
        """Wait until the job has completed. Raises: JobFailedError if it fails or is cancelled."""
        for job in self.watch(job_id, poll_seconds=poll_seconds):
            last = job
        return succeeded(last)

    def download(
        self,
        job_id: str,
        path: str | Path,
        *,
        format: ResultFormat,
        progress: Progress | None = None,
    ) -> Path:
        """Save the weighted dataset to a file, which appears under `path` only when it is complete.

        progress: shows how many bytes were received.
        """
        return self._connection.save(_results(job_id, format), Path(path), progress)

    def parts(self, job_id: str, *, cursor: str | None = None) -> DatasetParts:
        """One page of the files of which the weighted dataset consists, in order.

        Args:
            cursor: next_cursor of the previous page.
        """
        return self._connection.send(_parts(job_id, cursor))

    def download_parts(
        self, job_id: str, folder: str | Path, *, progress: Progress | None = None
    ) -> Path:
        """Save the weighted dataset to a folder: its parts, and at last dataset.json, their list.

        Several parts are received at a time, and each is checked by its checksum. Called again
        after an interruption, it keeps what is there and continues.

        progress: shows how many bytes of parts are there.
        Raises: DatasetError if the folder has parts of another dataset.
        """
        pages = [self.parts(job_id)]
        while pages[-1].next_cursor is not None:
            pages.append(self.parts(job_id, cursor=pages[-1].next_cursor))
        dataset = _joined(pages)
        saved = DatasetFolder(Path(folder), dataset)
        _show(progress, 0, dataset.bytes)

        def save(part: DatasetPart) -> int:
            self._connection.fetch(_sources(job_id, part), saved.file(part))
            return part.bytes

        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            done = 0
            for size in pool.map(save, dataset.parts):
                done += size
                _show(progress, done, dataset.bytes)
        return saved.publish()

    def download_errors(self, job_id: str, path: str | Path) -> Path:
        """Save the rejected rows, with their reasons, as JSONL."""
        return self._connection.save(_errors(job_id), Path(path))


class AsyncJobs:
    """Batch jobs, as `client.jobs`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(
        self,
        file_id: str | None = None,
        *,
        file_ids: Sequence[str] | None = None,
        input: str | None = None,
        prefix: str | None = None,
        truncation: Truncation = "error",
        max_rejected_share: float = MAX_REJECTED_SHARE,
        priority: Priority = "batch",
        merge: Merge = "auto",
        pairs: Pairs | None = None,
        max_error: float | None = None,
    ) -> Job:
        """Submit a job for an uploaded file, or for the path of an input below --input-prefix.

        Args:
            file_ids: several uploaded files instead, which are annotated as one, in this order.
            prefix: path of a folder below --input-prefix instead, whose files are taken as one.
            truncation: treatment of texts that are too long for the annotator: "error" rejects
                the row, "prompt_left" drops the oldest tokens of the prompt.
            max_rejected_share: share of invalid rows, 0 to 1, above which the job fails early.
            priority: "interactive" puts the job before the other jobs of the same API key.
            merge: "auto" makes the dataset one file too unless it is large, "never" does not.
            pairs: pairs for each row that has a list of responses: "best_worst" of them,
                "adjacent" ones in the ranking, or "all"; without it, such rows are rejected.
            max_error: adds the column certified, true above the threshold of the annotator's
                certificate of this max_error, which it has to have.
        """
        options = (truncation, max_rejected_share, priority, merge, pairs, max_error)
        return await self._connection.send(_create(file_id, file_ids, input, prefix, *options))

    async def list(
        self,
        *,
        state: JobState | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobList:
        """One page of jobs, newest first; a time without a time zone is local time.

        Args:
            created_after: only jobs created then or later.
            created_before: only jobs created earlier than this.
            limit: maximum number of jobs per page.
            cursor: next_cursor of the previous page.
        """
        created = (created_after, created_before)
        return await self._connection.send(_list(state, created, limit, cursor))

    async def get(self, job_id: str) -> Job:
        """The job in its current state."""
        return await self._connection.send(_get(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Cancel the job; its finished rows can be downloaded, and the rest resumed later."""
        return await self._connection.send(_cancel(job_id))

    async def resume(self, job_id: str, *, repin: bool = False) -> Job:
        """Resume a failed or cancelled job; finished rows are not annotated again.

        Args:
            repin: annotate all rows anew, by the annotator that the service hosts from now on;
                otherwise the job waits until its own is hosted.
        """
        return await self._connection.send(_resume(job_id, repin))

    async def delete(self, job_id: str) -> Job:
        """Delete an ended job with its results, and return it. Its input file stays.

        Raises: ConflictError if it has not ended.
        """
        return await self._connection.send(_delete(job_id))

    async def watch(self, job_id: str, *, poll_seconds: float = 0.5) -> AsyncIterator[Job]:
        """Poll the job every `poll_seconds`; yields it each time, until it has ended."""
        while True:
            job = await self.get(job_id)
            yield job
            if job.state in FINAL_STATES:
                return
            await self._connection.sleep(poll_seconds)

    async def events(self, job_id: str) -> AsyncIterator[Job]:
        """Yield the job now and after each change until it has ended, without polling.

        After a lost connection it reconnects, and continues where it stopped.
        """
        events = JobEvents(job_id, self._connection.max_retries)
        while True:
            failure = None
            try:
                async with self._connection.stream(events.request()) as response:
                    if response.status_code == HTTPStatus.NO_CONTENT:
                        return
                    async for line in response.aiter_lines():
                        job = events.feed(line)
                        if job is not None:
                            yield job
                        if events.ended:
                            return
            except CwpoError as error:
                failure = error
            await self._connection.sleep(events.delay(failure))

    async def wait(self, job_id: str, *, poll_seconds: float = 0.5) -> Job:
        """Wait until the job has completed. Raises: JobFailedError if it fails or is cancelled."""
        async for job in self.watch(job_id, poll_seconds=poll_seconds):
            last = job
        return succeeded(last)

    async def download(
        self,
        job_id: str,
        path: str | Path,
        *,
        format: ResultFormat,
        progress: Progress | None = None,
    ) -> Path:
        """Save the weighted dataset to a file, which appears under `path` only when it is complete.

        progress: shows how many bytes were received.
        """
        return await self._connection.save(_results(job_id, format), Path(path), progress)

    async def parts(self, job_id: str, *, cursor: str | None = None) -> DatasetParts:
        """One page of the files of which the weighted dataset consists, in order.

        Args:
            cursor: next_cursor of the previous page.
        """
        return await self._connection.send(_parts(job_id, cursor))

    async def download_parts(
        self, job_id: str, folder: str | Path, *, progress: Progress | None = None
    ) -> Path:
        """Save the weighted dataset to a folder: its parts, and at last dataset.json, their list.

        Several parts are received at a time, and each is checked by its checksum. Called again
        after an interruption, it keeps what is there and continues.

        progress: shows how many bytes of parts are there.
        Raises: DatasetError if the folder has parts of another dataset.
        """
        pages = [await self.parts(job_id)]
        while pages[-1].next_cursor is not None:
            pages.append(await self.parts(job_id, cursor=pages[-1].next_cursor))
        dataset = _joined(pages)
        saved = DatasetFolder(Path(folder), dataset)
        _show(progress, 0, dataset.bytes)

        gate = asyncio.Semaphore(PARTS_AT_ONCE)

        async def save(part: DatasetPart) -> int:
            async with gate:
                await self._connection.fetch(_sources(job_id, part), saved.file(part))
            return part.bytes

        tasks = [asyncio.create_task(save(part)) for part in dataset.parts]
        try:
            done = 0
            for task in tasks:
                done += await task
                _show(progress, done, dataset.bytes)
        finally:
            for task in tasks:
                task.cancel()
        return saved.publish()

    async def download_errors(self, job_id: str, path: str | Path) -> Path:
        """Save the rejected rows, with their reasons, as JSONL."""
        return await self._connection.save(_errors(job_id), Path(path))


def succeeded(job: Job) -> Job:
    """The same job. Raises: JobFailedError if it has not completed."""
    if job.state in ("failed", "cancelled"):
        raise JobFailedError(f"job {job.id} {job.state}: {job.error or 'no reason was given'}")
    return job


def _create(
    file_id: str | None,
    file_ids: Sequence[str] | None,
    input: str | None,
    prefix: str | None,
    truncation: Truncation,
    max_rejected_share: float,
    priority: Priority,
    merge: Merge,
    pairs: Pairs | None,
    max_error: float | None,
) -> Call[Job]:
    """Raises: CwpoError for inputs of more than one kind, or none."""
    try:
        body = JobRequest(
            file_id=file_id,
            file_ids=None if file_ids is None else list(file_ids),
            input=input,
            prefix=prefix,
            truncation=truncation,
            max_rejected_share=max_rejected_share,
            priority=priority,
            merge=merge,
            pairs=pairs,
            max_error=max_error,
        )
    except ValidationError as error:
        raise CwpoError(f"the job cannot be submitted: {mistake_in(error)}") from error
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    return Call("POST", "/jobs", Job, body=body, headers=headers)


def _list(
    state: JobState | None,
    created: tuple[datetime | None, datetime | None],
    limit: int,
    cursor: str | None,
) -> Call[JobList]:
    after, before = (None if at is None else at.astimezone().isoformat() for at in created)
    bounds = {"created_after": after, "created_before": before}
    params = {"state": state, **bounds, "limit": limit, "cursor": cursor}
    return Call("GET", "/jobs", JobList, params=params)


def _get(job_id: str) -> Call[Job]:
    return Call("GET", f"/jobs/{job_id}", Job)


def _cancel(job_id: str) -> Call[Job]:
    return Call("POST", f"/jobs/{job_id}/cancel", Job)


def _resume(job_id: str, repin: bool) -> Call[Job]:
    params = {"repin": True} if repin else {}
    return Call("POST", f"/jobs/{job_id}/resume", Job, params=params)


def _delete(job_id: str) -> Call[Job]:
    return Call("DELETE", f"/jobs/{job_id}", Job)


def _results(job_id: str, format: ResultFormat) -> Request:
    return Request("GET", f"/jobs/{job_id}/results", params={"format": format})


def _parts(job_id: str, cursor: str | None) -> Call[DatasetParts]:
    return Call("GET", f"/jobs/{job_id}/parts", DatasetParts, params={"cursor": cursor})


def _joined(pages: list[DatasetParts]) -> DatasetParts:
    return pages[0].model_copy(update={"parts": [part for page in pages for part in page.parts]})


def _sources(job_id: str, part: DatasetPart) -> list[Request]:
    """Where a part can be had: from the store, if it has a URL there, and from the service."""
    of_service = Request("GET", f"/jobs/{job_id}/parts/{part.name}")
    return [of_service] if part.url is None else [Request("GET", part.url), of_service]


def _show(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress.update(done, total=total)


def _errors(job_id: str) -> Request:
    return Request("GET", f"/jobs/{job_id}/errors")
