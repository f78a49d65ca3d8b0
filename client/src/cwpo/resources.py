"""The calls of the REST contract, built once for the sync and the async client."""

from __future__ import annotations

import hashlib
import uuid
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from cwpo.datasets import file_format
from cwpo.errors import CwpoError
from cwpo.transport import Call
from cwpo.types import (
    AnnotateRequest,
    AnnotateResponse,
    File,
    FileFormat,
    Job,
    JobList,
    JobRequest,
    JobState,
    ModelInfo,
    Priority,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    Triplet,
    Truncation,
    Usage,
)

CONTENT_TYPES: dict[FileFormat, str] = {
    "jsonl": "application/x-ndjson",
    "jsonl.gz": "application/gzip",
    "parquet": "application/vnd.apache.parquet",
}


def new_idempotency_key() -> str:
    """A key that makes all retries of one submission one submission."""
    return uuid.uuid4().hex


def annotate(
    triplets: Sequence[Triplet], truncation: Truncation, priority: Priority
) -> Call[AnnotateResponse]:
    """POST /annotate."""
    body = AnnotateRequest(triplets=list(triplets), truncation=truncation, priority=priority)
    return Call("POST", "/annotate", AnnotateResponse, body)


def with_ids(triplets: Sequence[Triplet]) -> list[Triplet]:
    """The triplets, those without an id named by their position in the whole input.

    Raises: CwpoError for none.
    """
    if not triplets:
        raise CwpoError("there is no triplet to annotate: the list is empty")
    return [
        triplet if triplet.id is not None else triplet.model_copy(update={"id": str(index)})
        for index, triplet in enumerate(triplets)
    ]


def joined(answers: Sequence[AnnotateResponse]) -> AnnotateResponse:
    """One answer out of those to the parts of a long input.

    Raises: CwpoError when the service changed its model in between.
    """
    if any(answer.model != answers[0].model for answer in answers):
        raise CwpoError("the service changed its model between two parts of the input: ask again")
    return AnnotateResponse(
        annotations=[item for answer in answers for item in answer.annotations],
        model=answers[0].model,
        usage=Usage(
            triplets=sum(answer.usage.triplets for answer in answers),
            tokens=sum(answer.usage.tokens for answer in answers),
        ),
    )


def score(
    items: Sequence[ScoreItem], truncation: Truncation, priority: Priority
) -> Call[ScoreResponse]:
    """POST /score. Raises: CwpoError for no item."""
    if not items:
        raise CwpoError("there is no item to score: the list is empty")
    body = ScoreRequest(items=list(items), truncation=truncation, priority=priority)
    return Call("POST", "/score", ScoreResponse, body)


def model() -> Call[ModelInfo]:
    """GET /model."""
    return Call("GET", "/model", ModelInfo)


def upload_headers(path: Path) -> dict[str, str]:
    """The headers of POST /files, the checksum of the file among them: it is read for this."""
    with path.open("rb") as body:
        digest = hashlib.file_digest(body, "sha256").digest()
    return {
        "Content-Type": CONTENT_TYPES[file_format(path)],
        "Content-Digest": f"sha-256=:{b64encode(digest).decode()}:",
        "Idempotency-Key": new_idempotency_key(),
    }


def job_request(
    file_id: str | None, input: str | None, truncation: Truncation, max_rejected_share: float
) -> JobRequest:
    """The body of POST /jobs. Raises: CwpoError for an upload and another input, or neither."""
    try:
        return JobRequest(
            file_id=file_id,
            input=input,
            truncation=truncation,
            max_rejected_share=max_rejected_share,
        )
    except ValidationError as error:
        raise CwpoError(f"no such job can be asked for: {error.errors()[0]['msg']}") from error


def create_job(request: JobRequest, idempotency_key: str) -> Call[Job]:
    """POST /jobs."""
    return Call("POST", "/jobs", Job, request, headers={"Idempotency-Key": idempotency_key})


def list_jobs(
    state: JobState | None,
    created: tuple[datetime | None, datetime | None],
    limit: int,
    cursor: str | None,
) -> Call[JobList]:
    """GET /jobs of the jobs created from a moment on, and before another; None for any."""
    after, before = (None if at is None else at.astimezone().isoformat() for at in created)
    bounds = {"created_after": after, "created_before": before}
    params = {"state": state, **bounds, "limit": limit, "cursor": cursor}
    return Call("GET", "/jobs", JobList, params=params)


def get_job(job_id: str) -> Call[Job]:
    """GET /jobs/{id}."""
    return Call("GET", f"/jobs/{job_id}", Job)


def cancel_job(job_id: str) -> Call[Job]:
    """POST /jobs/{id}/cancel."""
    return Call("POST", f"/jobs/{job_id}/cancel", Job)


def delete_job(job_id: str) -> Call[Job]:
    """DELETE /jobs/{id}."""
    return Call("DELETE", f"/jobs/{job_id}", Job)


def get_file(file_id: str) -> Call[File]:
    """GET /files/{id}."""
    return Call("GET", f"/files/{file_id}", File)


def delete_file(file_id: str) -> Call[File]:
    """DELETE /files/{id}."""
    return Call("DELETE", f"/files/{file_id}", File)


def resume_job(job_id: str) -> Call[Job]:
    """POST /jobs/{id}/resume."""
    return Call("POST", f"/jobs/{job_id}/resume", Job)
