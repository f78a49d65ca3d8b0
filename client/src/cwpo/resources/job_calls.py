"""What is sent for batch jobs, the same with and without asyncio."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from cwpo.errors import CwpoError, mistake_in
from cwpo.transport import Call, Request
from cwpo.types import (
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


def create(
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
    idempotency_key: str | None,
) -> Call[Job]:
    """Submit a job. Raises: CwpoError for inputs of more than one kind, or none."""
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
    headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    return Call("POST", "/jobs", Job, body=body, headers=headers)


def inputs(file_ids: Sequence[str]) -> dict[str, Any]:
    """The arguments of `create` that name one uploaded file, or several."""
    return {"file_id": file_ids[0]} if len(file_ids) == 1 else {"file_ids": file_ids}


def file_key(idempotency_key: str | None, number: int) -> str | None:
    """The idempotency key of an upload for a job that has this one."""
    return None if idempotency_key is None else f"{idempotency_key}-file-{number}"


def list_jobs(
    state: JobState | None,
    created: tuple[datetime | None, datetime | None],
    limit: int,
    cursor: str | None,
) -> Call[JobList]:
    """One page of jobs."""
    after, before = (None if at is None else at.astimezone().isoformat() for at in created)
    bounds = {"created_after": after, "created_before": before}
    params = {"state": state, **bounds, "limit": limit, "cursor": cursor}
    return Call("GET", "/jobs", JobList, params=params)


def get(job_id: str) -> Call[Job]:
    """The job."""
    return Call("GET", f"/jobs/{job_id}", Job)


def cancel(job_id: str) -> Call[Job]:
    """Cancel the job."""
    return Call("POST", f"/jobs/{job_id}/cancel", Job)


def resume(job_id: str, repin: bool) -> Call[Job]:
    """Resume the job."""
    params = {"repin": True} if repin else {}
    return Call("POST", f"/jobs/{job_id}/resume", Job, params=params)


def delete(job_id: str) -> Call[Job]:
    """Delete the job."""
    return Call("DELETE", f"/jobs/{job_id}", Job)


def results(job_id: str, format: ResultFormat) -> Request:
    """The dataset as one file."""
    return Request("GET", f"/jobs/{job_id}/results", params={"format": format})


def parts(job_id: str, cursor: str | None) -> Call[DatasetParts]:
    """One page of the dataset's parts."""
    return Call("GET", f"/jobs/{job_id}/parts", DatasetParts, params={"cursor": cursor})


def joined_pages(pages: list[DatasetParts]) -> DatasetParts:
    """The dataset, with the parts of all pages."""
    return pages[0].model_copy(update={"parts": [part for page in pages for part in page.parts]})


def part_sources(job_id: str, part: DatasetPart) -> list[Request]:
    """Where a part can be had: from the store, if it has a URL there, and from the service."""
    of_service = Request("GET", f"/jobs/{job_id}/parts/{part.name}")
    return [of_service] if part.url is None else [Request("GET", part.url), of_service]


def errors(job_id: str) -> Request:
    """The rejected rows."""
    return Request("GET", f"/jobs/{job_id}/errors")
