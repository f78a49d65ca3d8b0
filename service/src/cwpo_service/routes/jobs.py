"""Batch jobs: submit, list, watch, cancel, resume, download, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import AwareDatetime
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from cwpo.types import MAX_JOB_FILES, DatasetParts, Job, JobList, JobRequest, JobState, ResultFormat
from cwpo_service.http.body import json_body
from cwpo_service.http.download import file_response
from cwpo_service.http.job_events import EventId, current_event, stream
from cwpo_service.problems import documented
from cwpo_service.routes.dependencies import CurrentJobs, CurrentService, Owner, scoped
from cwpo_service.routes.documentation import accepts, leads_to
from cwpo_service.routes.files import IdempotencyKey
from cwpo_worker.jobs.confidences import DatasetConfidences

router = APIRouter(
    prefix="/jobs",
    tags=["jobs"],
    dependencies=[scoped("jobs")],
    responses=documented(401, 403, 422, 429, 500),
)

_MEDIA_TYPES: dict[ResultFormat, str] = {
    "parquet": "application/vnd.apache.parquet",
    "jsonl": "application/x-ndjson",
}


def _file(*media_types: str) -> dict[int | str, dict[str, object]]:
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media_types}
    return {
        200: {"description": "The whole file.", "content": content},
        206: {"description": "The range that was asked for.", "content": content},
    }


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    responses={
        **documented(400, 404, 409, 413, 415, 503),
        **leads_to(
            "job_id",
            "get_job",
            "cancel_job",
            "resume_job",
            "delete_job",
            "download_results",
            "list_parts",
            "job_confidences",
            "download_errors",
            "follow_job",
        ),
    },
    openapi_extra=accepts(JobRequest, {"file_id": "file_0123456789abcdef"}),
)
async def submit_job(
    body: Annotated[JobRequest, Depends(json_body(JobRequest, max_items=MAX_JOB_FILES))],
    service: CurrentService,
    jobs: CurrentJobs,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Annotate every row of an uploaded file.

    With `max_error`, the job is pinned to the annotator that is hosted now, whose certificate says
    which labels are certified. While its confidences have drifted, no such job is accepted.
    """
    service.admission.check_open()
    certified_by = None if body.max_error is None else service.certified_by(body.max_error)
    return await run_in_threadpool(
        jobs.ledger.submit,
        body,
        owner=owner,
        idempotency_key=idempotency_key,
        certified_by=certified_by,
    )


@router.get("", summary="List jobs", responses=documented(503))
async def list_jobs(
    jobs: CurrentJobs,
    owner: Owner,
    state: Annotated[JobState | None, Query(description="only jobs in this state")] = None,
    created_after: Annotated[
        AwareDatetime | None, Query(description="only jobs created then or later")
    ] = None,
    created_before: Annotated[
        AwareDatetime | None, Query(description="only jobs created earlier than that")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="jobs a page")] = 50,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
) -> JobList:
    """One page of jobs, newest first."""
    return await run_in_threadpool(
        jobs.ledger.list,
        owner=owner,
        state=state,
        created_after=created_after,
        created_before=created_before,
        limit=limit,
        cursor=cursor,
    )


@router.get("/{job_id}", summary="A job", responses=documented(404, 503))
async def get_job(job_id: str, jobs: CurrentJobs, owner: Owner) -> Job:
    """The job as it stands."""
    return await run_in_threadpool(jobs.ledger.get, job_id, owner=owner)


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=documented(404, 409, 503))
async def cancel_job(job_id: str, jobs: CurrentJobs, owner: Owner) -> Job:
    """Stop the job. What it has finished becomes its results; resumed, it does the rest.

    A job that has ended already cannot be cancelled.
    """
    return await run_in_threadpool(jobs.ledger.cancel, job_id, owner=owner)


@router.post("/{job_id}/resume", summary="Resume a job", responses=documented(404, 409, 503))
async def resume_job(
    job_id: str,
    jobs: CurrentJobs,
    owner: Owner,
    repin: Annotated[
        bool,
        Query(description="annotate all rows anew, by the annotator that is hosted from now on"),
    ] = False,
) -> Job:
    """Go on with a failed or cancelled job. What was finished is kept and not done again.

    The job keeps its annotator, and waits until a replica hosts it. With `repin` it takes the one
    that answers first, and nothing is kept, since a dataset never mixes annotators; a job that is
    under way has to be cancelled before.
    """
    return await run_in_threadpool(jobs.ledger.resume, job_id, owner=owner, repin=repin)


@router.delete("/{job_id}", summary="Delete a job", responses=documented(404, 409, 503))
async def delete_job(job_id: str, jobs: CurrentJobs, owner: Owner) -> Job:
    """Forget an ended job with its results; the answer is what it was. The input stays."""
    return await run_in_threadpool(jobs.ledger.delete, job_id, owner=owner)


@router.get(
    "/{job_id}/results",
    summary="Download the weighted dataset",
    response_class=Response,
    responses={**documented(404, 409, 416, 503), **_file(*_MEDIA_TYPES.values())},
)
async def download_results(
    job_id: str,
    jobs: CurrentJobs,
    owner: Owner,
    request: Request,
    format: Annotated[ResultFormat, Query(description="of the file")] = "parquet",
) -> Response:
    """The finished dataset as one file, in input order. Ranges are served, so it can be resumed.

    Of a cancelled job it holds the rows that were finished, which `progress` counts; there is
    none if no shard was. A large dataset, or one of a job with `merge: never`, is parts only: the
    answer is 409, and `/jobs/{job_id}/parts` lists them.
    """
    blob = await run_in_threadpool(jobs.ledger.open_results, job_id, format, owner=owner)
    name = f"{job_id}.{format}"
    return file_response(request, blob, name=name, media_type=_MEDIA_TYPES[format])


@router.get(
    "/{job_id}/parts",
    summary="List the parts of the weighted dataset",
    responses=documented(404, 409, 503),
)
async def list_parts(
    job_id: str,
    jobs: CurrentJobs,
    owner: Owner,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before")] = None,
) -> DatasetParts:
    """Up to 1,000 Parquet files at a time: all files together are the finished dataset, in order.

    Each can be read alone, and has its size and SHA-256. Where the operator allows it and the store
    can, each comes with a presigned `url`, which downloads it from the store itself.
    """
    return await run_in_threadpool(
        jobs.ledger.parts, job_id, owner=owner, cursor=cursor, url_seconds=jobs.url_seconds
    )


@router.get(
    "/{job_id}/confidences",
    summary="How sure the labels are",
    responses=documented(404, 409, 503),
)
async def job_confidences(job_id: str, jobs: CurrentJobs, owner: Owner) -> DatasetConfidences:
    """The distribution of the dataset's confidences, with its most and least confident rows.

    They were counted as the dataset was published; of a cancelled job they are of the rows that
    were finished.
    """
    return await run_in_threadpool(jobs.ledger.confidences, job_id, owner=owner)


@router.get(
    "/{job_id}/parts/{name}",
    summary="Download a part of the weighted dataset",
    response_class=Response,
    responses={**documented(404, 409, 416, 503), **_file(_MEDIA_TYPES["parquet"])},
)
async def download_part(
    job_id: str, name: str, jobs: CurrentJobs, owner: Owner, request: Request
) -> Response:
    """A Parquet file with some rows of the dataset. Ranges are served, so it can be resumed."""
    blob = await run_in_threadpool(jobs.ledger.open_part, job_id, name, owner=owner)
    return file_response(request, blob, name=f"{job_id}.{name}", media_type=_MEDIA_TYPES["parquet"])


@router.get(
    "/{job_id}/errors",
    summary="Download the rejected rows",
    response_class=Response,
    responses={**documented(404, 409, 416, 503), **_file("application/x-ndjson")},
)
async def download_errors(
    job_id: str, jobs: CurrentJobs, owner: Owner, request: Request
) -> Response:
    """The rows that could not be annotated: row, id, code and detail, a JSON line each."""
    blob = await run_in_threadpool(jobs.ledger.open_errors, job_id, owner=owner)
    name = f"{job_id}.errors.jsonl"
    return file_response(request, blob, name=name, media_type="application/x-ndjson")


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_class=Response,
    responses={
        **documented(404, 503),
        200: {
            "description": "Server-sent events named `job`; the data of each is the job.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "The job has ended, and the client has seen its last event."},
    },
)
async def follow_job(
    job_id: str,
    service: CurrentService,
    jobs: CurrentJobs,
    owner: Owner,
    last_event_id: Annotated[
        str | None, Header(description="id of the last event that the client has seen")
    ] = None,
) -> Response:
    """The job now, again after every step, and at last as it ended.

    The id of an event is `{version}.{rows_done}`. A client that comes back with the last one gets
    what is newer, and 204 once there is nothing more to come.
    """
    seen = EventId.parse(last_event_id)
    event = await current_event(jobs.ledger, job_id, owner)
    if event.is_last and seen is not None and seen >= event.id:
        return Response(status_code=204)
    return StreamingResponse(
        stream(jobs.ledger, event, owner, seen, service.admission.draining),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store"},
    )
