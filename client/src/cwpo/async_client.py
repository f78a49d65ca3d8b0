"""The asynchronous SDK client; the twin of Client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
from pydantic import BaseModel

from cwpo import resources, transport
from cwpo.client import partial_file, succeeded
from cwpo.errors import APIError, ConnectionFailedError
from cwpo.events import EventReader
from cwpo.transport import Call
from cwpo.types import (
    FINAL_STATES,
    MAX_REJECTED_SHARE,
    AnnotateResponse,
    File,
    Job,
    JobList,
    JobState,
    ModelInfo,
    Priority,
    ResultFormat,
    ScoreItem,
    ScoreResponse,
    Triplet,
    Truncation,
)

M = TypeVar("M", bound=BaseModel)


class AsyncClient:
    """Talks to a cwpo service from asyncio; arguments and errors are those of Client."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        max_retries: int = 4,
    ) -> None:
        settings = transport.ClientSettings()
        self.url = url or settings.url
        self.max_retries = max_retries
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=transport.headers(api_key or settings.api_key),
            timeout=timeout,
        )
        self.files = AsyncFiles(self)
        self.jobs = AsyncJobs(self)

    async def annotate(
        self,
        triplets: Sequence[Triplet],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        batch_size: int = 256,
        concurrency: int = 4,
    ) -> AnnotateResponse:
        """Label the triplets, in order; long inputs go in several requests at a time."""
        named = resources.with_ids(triplets)
        gate = asyncio.Semaphore(concurrency)

        async def part(at: int) -> AnnotateResponse:
            async with gate:
                return await self._send(
                    resources.annotate(named[at : at + batch_size], truncation, priority)
                )

        starts = range(0, len(named), batch_size)
        return resources.joined(await asyncio.gather(*(part(at) for at in starts)))

    async def score(
        self,
        items: Sequence[ScoreItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
    ) -> ScoreResponse:
        """Raw scores of single responses, in order."""
        return await self._send(resources.score(items, truncation, priority))

    async def model(self) -> ModelInfo:
        """What the service has loaded, and its limits."""
        return await self._send(resources.model())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _send(self, call: Call[M]) -> M:
        return call.parse(await self._retried(lambda: self._http.request(**call.arguments())))

    async def _retried(self, request: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
        attempt = 0
        while True:
            response: httpx.Response | None = None
            try:
                response = await request()
                if response.is_success:
                    return response
                if attempt >= self.max_retries or not transport.is_retryable(response):
                    raise transport.error_of(response)
            except httpx.TransportError as error:
                if attempt >= self.max_retries:
                    raise transport.connection_failed(self.url, error) from error
            await asyncio.sleep(transport.retry_delay(attempt, response))
            attempt += 1

    @asynccontextmanager
    async def _stream(
        self, path: str, params: dict[str, str], headers: dict[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        try:
            async with self._http.stream("GET", path, params=params, headers=headers) as response:
                if not response.is_success:
                    await response.aread()
                    raise transport.error_of(response)
                yield response
        except httpx.TransportError as error:
            raise transport.connection_failed(self.url, error) from error


class AsyncFiles:
    """Uploads; reached as `client.files`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def upload(self, path: str | Path) -> File:
        """Stream a JSONL, JSONL.gz or Parquet file of triplets to the service, checksum checked.

        Raises: DatasetError for a name of another kind.
        """
        path = Path(path)
        headers = await asyncio.to_thread(resources.upload_headers, path)

        def request() -> Awaitable[httpx.Response]:
            return self._client._http.post("/files", content=_chunks(path), headers=headers)

        return File.model_validate_json((await self._client._retried(request)).content)

    async def get(self, file_id: str) -> File:
        """What the service knows of an uploaded file."""
        return await self._client._send(resources.get_file(file_id))

    async def delete(self, file_id: str) -> File:
        """Remove an uploaded file; what it was. Raises: ConflictError while a job needs it."""
        return await self._client._send(resources.delete_file(file_id))


class AsyncJobs:
    """Batch jobs; reached as `client.jobs`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        file_id: str | None = None,
        *,
        input: str | None = None,
        truncation: Truncation = "error",
        max_rejected_share: float = MAX_REJECTED_SHARE,
    ) -> Job:
        """Submit an uploaded file, or an input below the service's --input-prefix by its path.

        The job fails early over that share of invalid rows.
        """
        request = resources.job_request(file_id, input, truncation, max_rejected_share)
        return await self._client._send(
            resources.create_job(request, resources.new_idempotency_key())
        )

    async def list(
        self,
        *,
        state: JobState | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobList:
        """One page of jobs, newest first, of jobs created at `created_after` or later.

        And before `created_before`; a time without a time zone is local time.
        """
        created = (created_after, created_before)
        return await self._client._send(resources.list_jobs(state, created, limit, cursor))

    async def get(self, job_id: str) -> Job:
        """The job as it stands."""
        return await self._client._send(resources.get_job(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Stop the job; what is finished can be downloaded, and the rest resumed."""
        return await self._client._send(resources.cancel_job(job_id))

    async def resume(self, job_id: str) -> Job:
        """Go on with a failed or cancelled job; what was finished is not done again."""
        return await self._client._send(resources.resume_job(job_id))

    async def delete(self, job_id: str) -> Job:
        """Forget an ended job with its results; what it was. Its input file stays.

        Raises: ConflictError if it has not ended.
        """
        return await self._client._send(resources.delete_job(job_id))

    async def watch(self, job_id: str, *, poll_seconds: float = 0.5) -> AsyncIterator[Job]:
        """The job again and again until it has ended."""
        while True:
            job = await self.get(job_id)
            yield job
            if job.state in FINAL_STATES:
                return
            await asyncio.sleep(poll_seconds)

    async def events(self, job_id: str) -> AsyncIterator[Job]:
        """The job now, after every step that it takes, and as it ended, without polling.

        A connection that breaks is taken up again where it broke.
        """
        reader = EventReader()
        failures = 0
        while True:
            try:
                async with self._client._stream(
                    f"/jobs/{job_id}/events", {}, reader.headers
                ) as response:
                    if response.status_code == HTTPStatus.NO_CONTENT:
                        return
                    async for line in response.aiter_lines():
                        told = reader.feed(line)
                        if told is not None:
                            failures = 0
                            job = Job.model_validate_json(told)
                            yield job
                            if job.state in FINAL_STATES:
                                return
                raise ConnectionFailedError(f"{self._client.url} told no more of job {job_id}")
            except (APIError, ConnectionFailedError) as error:
                if failures >= self._client.max_retries or not transport.is_passing(error):
                    raise
            await asyncio.sleep(transport.retry_delay(failures, None))
            failures += 1

    async def wait(self, job_id: str, *, poll_seconds: float = 0.5) -> Job:
        """The job when it has completed. Raises: JobFailedError if it failed or was cancelled."""
        async for job in self.watch(job_id, poll_seconds=poll_seconds):
            last = job
        return succeeded(last)

    async def download(self, job_id: str, path: str | Path, *, format: ResultFormat) -> Path:
        """Save the weighted dataset; nothing stands under `path` before it is complete."""
        return await self._save(f"/jobs/{job_id}/results", {"format": format}, Path(path))

    async def download_errors(self, job_id: str, path: str | Path) -> Path:
        """Save the rejected rows with their reasons, as JSONL."""
        return await self._save(f"/jobs/{job_id}/errors", {}, Path(path))

    async def _save(self, url: str, params: dict[str, str], path: Path) -> Path:
        with partial_file(path) as out:
            async with self._client._stream(url, params) as response:
                async for chunk in response.aiter_bytes():
                    out.write(chunk)
        return path


async def _chunks(path: Path, size: int = 1 << 20) -> AsyncIterator[bytes]:
    with path.open("rb") as body:
        while chunk := await asyncio.to_thread(body.read, size):
            yield chunk
