"""The synchronous SDK client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import httpx
from pydantic import BaseModel

from cwpo import resources, transport
from cwpo.errors import APIError, ConnectionFailedError, JobFailedError
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


class Client:
    """Talks to a cwpo service.

    Args:
        url: of the service; CWPO_URL, else http://127.0.0.1:8000.
        api_key: CWPO_API_KEY, else none.
        timeout: seconds an answer may take.
        max_retries: of a request that found no or a busy service; Retry-After is honoured.

    Every method raises APIError for an error answer and ConnectionFailedError for none.
    """

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
        self._http = httpx.Client(
            base_url=self.url,
            headers=transport.headers(api_key or settings.api_key),
            timeout=timeout,
        )
        self.files = Files(self)
        self.jobs = Jobs(self)

    def annotate(
        self,
        triplets: Sequence[Triplet],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        batch_size: int = 256,
    ) -> AnnotateResponse:
        """Label the triplets, in order; long inputs go in requests of batch_size."""
        named = resources.with_ids(triplets)
        answers = [
            self._send(resources.annotate(named[at : at + batch_size], truncation, priority))
            for at in range(0, len(named), batch_size)
        ]
        return resources.joined(answers)

    def score(
        self,
        items: Sequence[ScoreItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
    ) -> ScoreResponse:
        """Raw scores of single responses, in order."""
        return self._send(resources.score(items, truncation, priority))

    def model(self) -> ModelInfo:
        """What the service has loaded, and its limits."""
        return self._send(resources.model())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, call: Call[M]) -> M:
        return call.parse(self._retried(lambda: self._http.request(**call.arguments())))

    def _retried(self, request: Callable[[], httpx.Response]) -> httpx.Response:
        attempt = 0
        while True:
            response: httpx.Response | None = None
            try:
                response = request()
                if response.is_success:
                    return response
                if attempt >= self.max_retries or not transport.is_retryable(response):
                    raise transport.error_of(response)
            except httpx.TransportError as error:
                if attempt >= self.max_retries:
                    raise transport.connection_failed(self.url, error) from error
            time.sleep(transport.retry_delay(attempt, response))
            attempt += 1

    @contextmanager
    def _stream(
        self, path: str, params: dict[str, str], headers: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        try:
            with self._http.stream("GET", path, params=params, headers=headers) as response:
                if not response.is_success:
                    response.read()
                    raise transport.error_of(response)
                yield response
        except httpx.TransportError as error:
            raise transport.connection_failed(self.url, error) from error


class Files:
    """Uploads; reached as `client.files`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def upload(self, path: str | Path) -> File:
        """Stream a JSONL, JSONL.gz or Parquet file of triplets to the service, checksum checked.

        Raises: DatasetError for a name of another kind.
        """
        path = Path(path)
        headers = resources.upload_headers(path)

        def request() -> httpx.Response:
            with path.open("rb") as body:
                return self._client._http.post("/files", content=body, headers=headers)

        return File.model_validate_json(self._client._retried(request).content)

    def get(self, file_id: str) -> File:
        """What the service knows of an uploaded file."""
        return self._client._send(resources.get_file(file_id))

    def delete(self, file_id: str) -> File:
        """Remove an uploaded file; what it was. Raises: ConflictError while a job needs it."""
        return self._client._send(resources.delete_file(file_id))


class Jobs:
    """Batch jobs; reached as `client.jobs`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
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
        return self._client._send(resources.create_job(request, resources.new_idempotency_key()))

    def list(
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
        return self._client._send(resources.list_jobs(state, created, limit, cursor))

    def get(self, job_id: str) -> Job:
        """The job as it stands."""
        return self._client._send(resources.get_job(job_id))

    def cancel(self, job_id: str) -> Job:
        """Stop the job; what is finished can be downloaded, and the rest resumed."""
        return self._client._send(resources.cancel_job(job_id))

    def resume(self, job_id: str) -> Job:
        """Go on with a failed or cancelled job; what was finished is not done again."""
        return self._client._send(resources.resume_job(job_id))

    def delete(self, job_id: str) -> Job:
        """Forget an ended job with its results; what it was. Its input file stays.

        Raises: ConflictError if it has not ended.
        """
        return self._client._send(resources.delete_job(job_id))

    def watch(self, job_id: str, *, poll_seconds: float = 0.5) -> Iterator[Job]:
        """The job again and again until it has ended."""
        while True:
            job = self.get(job_id)
            yield job
            if job.state in FINAL_STATES:
                return
            time.sleep(poll_seconds)

    def events(self, job_id: str) -> Iterator[Job]:
        """The job now, after every step that it takes, and as it ended, without polling.

        A connection that breaks is taken up again where it broke.
        """
        reader = EventReader()
        failures = 0
        while True:
            try:
                with self._client._stream(f"/jobs/{job_id}/events", {}, reader.headers) as response:
                    if response.status_code == HTTPStatus.NO_CONTENT:
                        return
                    for line in response.iter_lines():
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
            time.sleep(transport.retry_delay(failures, None))
            failures += 1

    def wait(self, job_id: str, *, poll_seconds: float = 0.5) -> Job:
        """The job when it has completed. Raises: JobFailedError if it failed or was cancelled."""
        for job in self.watch(job_id, poll_seconds=poll_seconds):
            last = job
        return succeeded(last)

    def download(self, job_id: str, path: str | Path, *, format: ResultFormat) -> Path:
        """Save the weighted dataset; nothing stands under `path` before it is complete."""
        return self._save(f"/jobs/{job_id}/results", {"format": format}, Path(path))

    def download_errors(self, job_id: str, path: str | Path) -> Path:
        """Save the rejected rows with their reasons, as JSONL."""
        return self._save(f"/jobs/{job_id}/errors", {}, Path(path))

    def _save(self, url: str, params: dict[str, str], path: Path) -> Path:
        with partial_file(path) as out, self._client._stream(url, params) as response:
            for chunk in response.iter_bytes():
                out.write(chunk)
        return path


@contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name `path` only when it was written to the end."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as out:
            yield out
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def succeeded(job: Job) -> Job:
    """The ended job itself. Raises: JobFailedError if it did not complete."""
    if job.state in ("failed", "cancelled"):
        raise JobFailedError(f"job {job.id} {job.state}: {job.error or 'no reason was given'}")
    return job
