"""POST /files, GET and DELETE /files/{id}."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.concurrency import run_in_threadpool

from cwpo.resources.files import CONTENT_TYPES
from cwpo.types import File
from cwpo_service.http.content_digest import expected_sha256
from cwpo_service.problems import ProblemError, documented
from cwpo_service.routes.dependencies import CurrentJobs, CurrentService, Owner, scoped
from cwpo_service.routes.documentation import leads_to

router = APIRouter(
    tags=["files"], dependencies=[scoped("jobs")], responses=documented(401, 403, 422, 429, 500)
)

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="makes all tries of one submission one submission",
    ),
]

# For the documentation only; expected_sha256 reads the header.
ContentDigest = Annotated[
    str | None, Header(description="sha-256=:BASE64: of the file, which is checked against it")
]

_FORMATS = {content_type: format for format, content_type in CONTENT_TYPES.items()}
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD = {
    "requestBody": {"required": True, "content": {kind: _BINARY for kind in sorted(_FORMATS)}}
}
_LINKS = leads_to("file_id", "get_file", "delete_file")
_LINKS[201]["links"]["submit_job"] = {
    "operationId": "submit_job",
    "requestBody": {"file_id": "$response.body#/id"},
}


@router.post(
    "/files",
    status_code=201,
    summary="Upload triplets",
    responses={**documented(400, 409, 413, 415, 503, 507), **_LINKS},
    openapi_extra=_UPLOAD,
)
async def upload_file(
    request: Request,
    service: CurrentService,
    jobs: CurrentJobs,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
    content_digest: ContentDigest = None,
) -> File:
    """Store a JSONL, gzipped JSONL or Parquet file; the body is the file itself, streamed.

    Content-Digest is checked before there is a file. An upload that breaks off leaves nothing, and
    all tries under one Idempotency-Key are one file.
    """
    service.admission.check_open()
    sha256 = expected_sha256(request)
    content_type = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
    format = _FORMATS.get(content_type)
    if format is None:
        known = ", ".join(sorted(_FORMATS))
        raise ProblemError(
            415,
            f"the Content-Type of a file is one of {known}, not {content_type}",
            reason="invalid",
        )
    length = request.headers.get("content-length")
    draft = await run_in_threadpool(
        jobs.files.receive,
        format,
        owner=owner,
        idempotency_key=idempotency_key,
        size=None if length is None else int(length),
    )
    try:
        async for chunk in request.stream():
            await run_in_threadpool(draft.write, chunk)
        return await run_in_threadpool(draft.commit, sha256)
    finally:
        await run_in_threadpool(draft.abort)


@router.get("/files/{file_id}", summary="A file", responses=documented(404, 503))
async def get_file(file_id: str, jobs: CurrentJobs, owner: Owner) -> File:
    """What is known of an uploaded file."""
    return await run_in_threadpool(jobs.files.get, file_id, owner=owner)


@router.delete("/files/{file_id}", summary="Delete a file", responses=documented(404, 409, 503))
async def delete_file(file_id: str, jobs: CurrentJobs, owner: Owner) -> File:
    """Remove an uploaded file; the answer is what it was. A job that has not ended keeps it."""
    return await run_in_threadpool(jobs.ledger.delete_file, file_id, owner=owner)
