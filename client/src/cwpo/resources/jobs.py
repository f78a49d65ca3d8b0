"""Batch jobs: /jobs and the paths below it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cwpo.connection import AsyncConnection, Connection
from cwpo.datasets.folder import DatasetFolder, part_rows, result_format
from cwpo.datasets.naming import forms_of
from cwpo.datasets.sources import Source, uploads
from cwpo.errors import CwpoError, JobFailedError
from cwpo.events import JobEvents
from cwpo.partial_file import ResumableFile
from cwpo.progress import Progress, shown
from cwpo.resources import job_calls
from cwpo.resources.files import AsyncFiles, Files
from cwpo.types import (
    FINAL_STATES,
    MAX_REJECTED_SHARE,
    DatasetPart,
    DatasetParts,
    Job,
    JobList,
    JobState,
    Merge,
    Pairs,
    Priority,
    ResultFormat,
    Truncation,
)

PARTS_AT_ONCE = 4
# The most that the service gives.
JOBS_A_PAGE = 100


class Jobs:
    """Batch jobs, as `client.jobs`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._files = Files(connection)

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
        idempotency_key: str | None = None,
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
            idempotency_key: name of this submission: however often it is sent, there is one job; by
                default a new one.
        """
        options = (truncation, max_rejected_share, priority, merge, pairs, max_error)
        return self._connection.send(
            job_calls.create(file_id, file_ids, input, prefix, *options, idempotency_key)
        )

    def submit(
        self,
        source: Source,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        max_rejected_share: float = MAX_REJECTED_SHARE,
        priority: Priority = "batch",
        merge: Merge = "auto",
        pairs: Pairs | None = None,
        max_error: float | None = None,
        idempotency_key: str | None = None,
        progress: Progress | bool = False,
    ) -> SubmittedJob:
        """Upload an input and submit a job for it.

        Args:
            source: a file (JSONL, Parquet, CSV or TSV), a folder or pattern of such files, several
                of these, or rows as `client.annotate` takes them. Several files are one input.
            columns: the input's names of columns, by the names that are needed, such as
                {"prompt": "question"}.
            idempotency_key: name of this submission: however often the same is submitted under it,
                there is one job; by default a new one.
            progress: shows how many bytes were uploaded, on stderr for True.

        The others are those of `create`.
        Raises: DatasetError, before anything is uploaded, for an input that cannot be read, or that
            lacks the columns that are needed, which are then named.
        """
        with (
            uploads(source, forms_of(pairs), columns) as paths,
            shown(progress, "upload", unit="bytes") as bar,
        ):
            file_ids = []
            for number, path in enumerate(paths):
                key = job_calls.file_key(idempotency_key, number)
                file = self._files.upload(path, progress=bar, idempotency_key=key)
                file_ids.append(file.id)
        job = self.create(
            **job_calls.inputs(file_ids),
            truncation=truncation,
            max_rejected_share=max_rejected_share,
            priority=priority,
            merge=merge,
            pairs=pairs,
            max_error=max_error,
            idempotency_key=idempotency_key,
        )
        return SubmittedJob(self, job)

    def open(self, job_id: str) -> SubmittedJob:
        """The job as an object of its own, as `submit` returns it."""
        return SubmittedJob(self, self.get(job_id))

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
        return self._connection.send(job_calls.list_jobs(state, created, limit, cursor))

    def list_iter(
        self,
        *,
        state: JobState | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> Iterator[Job]:
        """All jobs, newest first, page by page as they are asked for; otherwise as `list`."""
        created = (created_after, created_before)
        cursor: str | None = None
        while True:
            page = self._connection.send(job_calls.list_jobs(state, created, JOBS_A_PAGE, cursor))
            yield from page.jobs
            cursor = page.next_cursor
            if cursor is None:
                return

    def get(self, job_id: str) -> Job:
        """The job in its current state."""
        return self._connection.send(job_calls.get(job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel the job; its finished rows can be downloaded, and the rest resumed later."""
        return self._connection.send(job_calls.cancel(job_id))

    def resume(self, job_id: str, *, repin: bool = False) -> Job:
        """Resume a failed or cancelled job; finished rows are not annotated again.

        Args:
            repin: annotate all rows anew, by the annotator that the service hosts from now on;
                otherwise the job waits until its own is hosted.
        """
        return self._connection.send(job_calls.resume(job_id, repin))

    def delete(self, job_id: str) -> Job:
        """Delete an ended job with its results, and return it. Its input file stays.

        Raises: ConflictError if it has not ended.
        """
        return self._connection.send(job_calls.delete(job_id))

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

    def wait(
        self, job_id: str, *, poll_seconds: float = 0.5, progress: Progress | bool = False
    ) -> Job:
        """Wait until the job has completed.

        progress: shows how many rows are done, on stderr for True.
        Raises: JobFailedError if it fails or is cancelled.
        """
        with shown(progress, "job", unit="rows") as bar:
            for job in self.watch(job_id, poll_seconds=poll_seconds):
                show_job(bar, job)
        return succeeded(job)

    def download(
        self,
        job_id: str,
        path: str | Path,
        *,
        format: ResultFormat | None = None,
        progress: Progress | bool | None = None,
    ) -> Path:
        """Save the weighted dataset to a file, which appears under `path` only when it is complete.

        After a lost connection it goes on where it stopped.

        Args:
            path: a .parquet or .jsonl file; or a folder, which gets the parts as `download_parts`
                has it.
            format: of the file, by default that of its suffix.
            progress: shows how many bytes were received, on stderr for True.
        Raises: DatasetError for another suffix; ConflictError for a dataset that is parts only.
        """
        format = format or result_format(Path(path))
        if format is None:
            return self.download_parts(job_id, path, progress=progress)
        with shown(progress, "download", unit="bytes") as bar:
            return self._connection.save(job_calls.results(job_id, format), Path(path), bar)

    def parts(self, job_id: str, *, cursor: str | None = None) -> DatasetParts:
        """One page of the files of which the weighted dataset consists, in order.

        Args:
            cursor: next_cursor of the previous page.
        """
        return self._connection.send(job_calls.parts(job_id, cursor))

    def download_parts(
        self, job_id: str, folder: str | Path, *, progress: Progress | bool | None = None
    ) -> Path:
        """Save the weighted dataset to a folder: its parts, and at last dataset.json, their list.

        Several parts are received at a time, and each is checked by its checksum. Called again
        after an interruption, it keeps what is there and continues.

        progress: shows how many bytes of parts are there, on stderr for True.
        Raises: DatasetError if the folder has parts of another dataset.
        """
        pages = [self.parts(job_id)]
        while pages[-1].next_cursor is not None:
            pages.append(self.parts(job_id, cursor=pages[-1].next_cursor))
        dataset = job_calls.joined_pages(pages)
        saved = DatasetFolder(Path(folder), dataset)

        def save(part: DatasetPart) -> int:
            self._connection.fetch(job_calls.part_sources(job_id, part), saved.file(part))
            return part.bytes

        with (
            shown(progress, "download", unit="bytes", total=dataset.bytes) as bar,
            ThreadPoolExecutor(PARTS_AT_ONCE) as pool,
        ):
            for size in pool.map(save, dataset.parts):
                bar.advance(size)
        return saved.publish()

    def results(self, job_id: str) -> Iterator[dict[str, Any]]:
        """The rows of the weighted dataset, in order, while its parts are downloaded one by one.

        A part is checked by its checksum before the first of its rows.
        """
        cursor: str | None = None
        with TemporaryDirectory(prefix="cwpo-") as folder:
            while True:
                page = self.parts(job_id, cursor=cursor)
                for part in page.parts:
                    file = ResumableFile(Path(folder) / part.name, part.bytes, part.sha256)
                    self._connection.fetch(job_calls.part_sources(job_id, part), file)
                    yield from part_rows(file.path)
                    file.path.unlink()
                cursor = page.next_cursor
                if cursor is None:
                    return

    def download_errors(self, job_id: str, path: str | Path) -> Path:
        """Save the rejected rows, with their reasons, as JSONL."""
        return self._connection.save(job_calls.errors(job_id), Path(path))


class AsyncJobs:
    """Batch jobs, as `client.jobs`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._files = AsyncFiles(connection)

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
        idempotency_key: str | None = None,
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
            idempotency_key: name of this submission: however often it is sent, there is one job; by
                default a new one.
        """
        options = (truncation, max_rejected_share, priority, merge, pairs, max_error)
        return await self._connection.send(
            job_calls.create(file_id, file_ids, input, prefix, *options, idempotency_key)
        )

    async def submit(
        self,
        source: Source,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        max_rejected_share: float = MAX_REJECTED_SHARE,
        priority: Priority = "batch",
        merge: Merge = "auto",
        pairs: Pairs | None = None,
        max_error: float | None = None,
        idempotency_key: str | None = None,
        progress: Progress | bool = False,
    ) -> AsyncSubmittedJob:
        """Upload an input and submit a job for it.

        Args:
            source: a file (JSONL, Parquet, CSV or TSV), a folder or pattern of such files, several
                of these, or rows as `client.annotate` takes them. Several files are one input.
            columns: the input's names of columns, by the names that are needed, such as
                {"prompt": "question"}.
            idempotency_key: name of this submission: however often the same is submitted under it,
                there is one job; by default a new one.
            progress: shows how many bytes were uploaded, on stderr for True.

        The others are those of `create`.
        Raises: DatasetError, before anything is uploaded, for an input that cannot be read, or that
            lacks the columns that are needed, which are then named.
        """
        with ExitStack() as stack:
            prepared = uploads(source, forms_of(pairs), columns)
            paths = await asyncio.to_thread(stack.enter_context, prepared)
            bar = stack.enter_context(shown(progress, "upload", unit="bytes"))
            file_ids = []
            for number, path in enumerate(paths):
                key = job_calls.file_key(idempotency_key, number)
                file = await self._files.upload(path, progress=bar, idempotency_key=key)
                file_ids.append(file.id)
        job = await self.create(
            **job_calls.inputs(file_ids),
            truncation=truncation,
            max_rejected_share=max_rejected_share,
            priority=priority,
            merge=merge,
            pairs=pairs,
            max_error=max_error,
            idempotency_key=idempotency_key,
        )
        return AsyncSubmittedJob(self, job)

    async def open(self, job_id: str) -> AsyncSubmittedJob:
        """The job as an object of its own, as `submit` returns it."""
        return AsyncSubmittedJob(self, await self.get(job_id))

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
        return await self._connection.send(job_calls.list_jobs(state, created, limit, cursor))

    async def list_iter(
        self,
        *,
        state: JobState | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> AsyncIterator[Job]:
        """All jobs, newest first, page by page as they are asked for; otherwise as `list`."""
        created = (created_after, created_before)
        cursor: str | None = None
        while True:
            call = job_calls.list_jobs(state, created, JOBS_A_PAGE, cursor)
            page = await self._connection.send(call)
            for job in page.jobs:
                yield job
            cursor = page.next_cursor
            if cursor is None:
                return

    async def get(self, job_id: str) -> Job:
        """The job in its current state."""
        return await self._connection.send(job_calls.get(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Cancel the job; its finished rows can be downloaded, and the rest resumed later."""
        return await self._connection.send(job_calls.cancel(job_id))

    async def resume(self, job_id: str, *, repin: bool = False) -> Job:
        """Resume a failed or cancelled job; finished rows are not annotated again.

        Args:
            repin: annotate all rows anew, by the annotator that the service hosts from now on;
                otherwise the job waits until its own is hosted.
        """
        return await self._connection.send(job_calls.resume(job_id, repin))

    async def delete(self, job_id: str) -> Job:
        """Delete an ended job with its results, and return it. Its input file stays.

        Raises: ConflictError if it has not ended.
        """
        return await self._connection.send(job_calls.delete(job_id))

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

    async def wait(
        self, job_id: str, *, poll_seconds: float = 0.5, progress: Progress | bool = False
    ) -> Job:
        """Wait until the job has completed.

        progress: shows how many rows are done, on stderr for True.
        Raises: JobFailedError if it fails or is cancelled.
        """
        with shown(progress, "job", unit="rows") as bar:
            async for job in self.watch(job_id, poll_seconds=poll_seconds):
                show_job(bar, job)
        return succeeded(job)

    async def download(
        self,
        job_id: str,
        path: str | Path,
        *,
        format: ResultFormat | None = None,
        progress: Progress | bool | None = None,
    ) -> Path:
        """Save the weighted dataset to a file, which appears under `path` only when it is complete.

        After a lost connection it goes on where it stopped.

        Args:
            path: a .parquet or .jsonl file; or a folder, which gets the parts as `download_parts`
                has it.
            format: of the file, by default that of its suffix.
            progress: shows how many bytes were received, on stderr for True.
        Raises: DatasetError for another suffix; ConflictError for a dataset that is parts only.
        """
        format = format or result_format(Path(path))
        if format is None:
            return await self.download_parts(job_id, path, progress=progress)
        with shown(progress, "download", unit="bytes") as bar:
            return await self._connection.save(job_calls.results(job_id, format), Path(path), bar)

    async def parts(self, job_id: str, *, cursor: str | None = None) -> DatasetParts:
        """One page of the files of which the weighted dataset consists, in order.

        Args:
            cursor: next_cursor of the previous page.
        """
        return await self._connection.send(job_calls.parts(job_id, cursor))

    async def download_parts(
        self, job_id: str, folder: str | Path, *, progress: Progress | bool | None = None
    ) -> Path:
        """Save the weighted dataset to a folder: its parts, and at last dataset.json, their list.

        Several parts are received at a time, and each is checked by its checksum. Called again
        after an interruption, it keeps what is there and continues.

        progress: shows how many bytes of parts are there, on stderr for True.
        Raises: DatasetError if the folder has parts of another dataset.
        """
        pages = [await self.parts(job_id)]
        while pages[-1].next_cursor is not None:
            pages.append(await self.parts(job_id, cursor=pages[-1].next_cursor))
        dataset = job_calls.joined_pages(pages)
        saved = DatasetFolder(Path(folder), dataset)
        gate = asyncio.Semaphore(PARTS_AT_ONCE)

        async def save(part: DatasetPart) -> int:
            async with gate:
                await self._connection.fetch(job_calls.part_sources(job_id, part), saved.file(part))
            return part.bytes

        tasks = [asyncio.create_task(save(part)) for part in dataset.parts]
        try:
            with shown(progress, "download", unit="bytes", total=dataset.bytes) as bar:
                for task in tasks:
                    bar.advance(await task)
        finally:
            for task in tasks:
                task.cancel()
        return saved.publish()

    async def results(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        """The rows of the weighted dataset, in order, while its parts are downloaded one by one.

        A part is checked by its checksum before the first of its rows.
        """
        cursor: str | None = None
        with TemporaryDirectory(prefix="cwpo-") as folder:
            while True:
                page = await self.parts(job_id, cursor=cursor)
                for part in page.parts:
                    file = ResumableFile(Path(folder) / part.name, part.bytes, part.sha256)
                    await self._connection.fetch(job_calls.part_sources(job_id, part), file)
                    for row in part_rows(file.path):
                        yield row
                    file.path.unlink()
                cursor = page.next_cursor
                if cursor is None:
                    return

    async def download_errors(self, job_id: str, path: str | Path) -> Path:
        """Save the rejected rows, with their reasons, as JSONL."""
        return await self._connection.save(job_calls.errors(job_id), Path(path))


class SubmittedJob:
    """A job of `client.jobs`, to wait for and to read.

    job: its state when it was last asked for.
    """

    def __init__(self, jobs: Jobs, job: Job) -> None:
        self._jobs = jobs
        self.job = job

    @property
    def id(self) -> str:
        """The id of the job, by which `client.jobs.open` finds it again."""
        return self.job.id

    def refresh(self) -> Job:
        """Ask for the state of the job."""
        self.job = self._jobs.get(self.id)
        return self.job

    def wait(self, *, poll_seconds: float = 0.5, progress: Progress | bool = False) -> Job:
        """Wait until the job has completed; the same as `client.jobs.wait`."""
        self.job = self._jobs.wait(self.id, poll_seconds=poll_seconds, progress=progress)
        return self.job

    def cancel(self) -> Job:
        """Cancel the job; its finished rows can be read."""
        self.job = self._jobs.cancel(self.id)
        return self.job

    def results(self) -> Iterator[dict[str, Any]]:
        """The rows of the weighted dataset; the same as `client.jobs.results`."""
        return self._jobs.results(self.id)

    def download(self, path: str | Path, *, progress: Progress | bool | None = None) -> Path:
        """Save the weighted dataset; the same as `client.jobs.download`."""
        return self._jobs.download(self.id, path, progress=progress)

    def download_errors(self, path: str | Path) -> Path:
        """Save the rejected rows, with their reasons, as JSONL."""
        return self._jobs.download_errors(self.id, path)


class AsyncSubmittedJob:
    """A job of `client.jobs`, to wait for and to read.

    job: its state when it was last asked for.
    """

    def __init__(self, jobs: AsyncJobs, job: Job) -> None:
        self._jobs = jobs
        self.job = job

    @property
    def id(self) -> str:
        """The id of the job, by which `client.jobs.open` finds it again."""
        return self.job.id

    async def refresh(self) -> Job:
        """Ask for the state of the job."""
        self.job = await self._jobs.get(self.id)
        return self.job

    async def wait(self, *, poll_seconds: float = 0.5, progress: Progress | bool = False) -> Job:
        """Wait until the job has completed; the same as `client.jobs.wait`."""
        self.job = await self._jobs.wait(self.id, poll_seconds=poll_seconds, progress=progress)
        return self.job

    async def cancel(self) -> Job:
        """Cancel the job; its finished rows can be read."""
        self.job = await self._jobs.cancel(self.id)
        return self.job

    def results(self) -> AsyncIterator[dict[str, Any]]:
        """The rows of the weighted dataset; the same as `client.jobs.results`."""
        return self._jobs.results(self.id)

    async def download(self, path: str | Path, *, progress: Progress | bool | None = None) -> Path:
        """Save the weighted dataset; the same as `client.jobs.download`."""
        return await self._jobs.download(self.id, path, progress=progress)

    async def download_errors(self, path: str | Path) -> Path:
        """Save the rejected rows, with their reasons, as JSONL."""
        return await self._jobs.download_errors(self.id, path)


def succeeded(job: Job) -> Job:
    """The same job. Raises: JobFailedError if it has not completed."""
    if job.state in ("failed", "cancelled"):
        raise JobFailedError(f"job {job.id} {job.state}: {job.error or 'no reason was given'}")
    return job


def show_job(progress: Progress, job: Job) -> None:
    """Show the state of a job and how many of its rows are done."""
    work = "job waits for its annotator" if job.waiting else f"job {job.state}"
    progress.update(job.progress.rows_done, total=job.progress.rows_total, work=work)
