"""Reviews: people label the uncertain rows of a job's dataset."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from cwpo_service.http.body import json_body
from cwpo_service.problems import documented
from cwpo_service.routes.dependencies import CurrentJobs, CurrentService, Owner, scoped
from cwpo_service.routes.documentation import accepts, leads_to
from cwpo_worker.reviews.review import (
    AnswerRequest,
    Review,
    ReviewRequest,
    ReviewStep,
    TurnRequest,
)

router = APIRouter(
    prefix="/reviews",
    tags=["reviews"],
    dependencies=[scoped("jobs")],
    responses=documented(401, 403, 422, 429, 500),
)

_SENT = documented(400, 404, 409, 413, 415, 503)
_TURN = {"reviewer": "Ada"}
_JSONL = {
    "description": "The answers, a JSON line each.",
    "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
}


class ReviewList(BaseModel):
    """Reviews, newest first."""

    reviews: list[Review]


async def _key_name(request: Request) -> str | None:
    return getattr(request.state, "key", None)


KeyName = Annotated[str | None, Depends(_key_name)]


@router.post(
    "",
    status_code=201,
    summary="Start a review",
    responses={
        **_SENT,
        **leads_to(
            *("review_id", "get_review", "delete_review", "next_row", "answer_row"),
            *("undo_answer", "download_answers"),
        ),
    },
    openapi_extra=accepts(ReviewRequest, {"job_id": "job-0123456789abcdef01234567"}),
)
async def start_review(
    body: Annotated[ReviewRequest, Depends(json_body(ReviewRequest))],
    service: CurrentService,
    jobs: CurrentJobs,
    owner: Owner,
) -> Review:
    """Select the uncertain rows of a job's dataset, spread over the data.

    Up to 2,000 rows are drawn, of which those come first whose embeddings (POST /embed) are unlike
    each other. Of a dataset with more than 200 parts, 200 that are spread evenly over it are looked
    at.
    """
    uncertain = await run_in_threadpool(jobs.reviews.uncertain, body, owner=owner)
    embeddings = await service.inference.embeddings([pair.triplet for pair in uncertain])
    create = partial(jobs.reviews.create, body, uncertain, embeddings, owner=owner)
    return await run_in_threadpool(create)


@router.get("", summary="List reviews", responses=documented(503))
async def list_reviews(jobs: CurrentJobs, owner: Owner) -> ReviewList:
    """The newest fifty."""
    return ReviewList(reviews=await run_in_threadpool(jobs.reviews.newest, owner=owner))


@router.get("/{review_id}", summary="A review", responses=documented(404, 503))
async def get_review(review_id: str, jobs: CurrentJobs, owner: Owner) -> Review:
    """The review and its progress."""
    return await run_in_threadpool(jobs.reviews.get, review_id, owner=owner)


@router.delete("/{review_id}", summary="Delete a review", responses=documented(404, 503))
async def delete_review(review_id: str, jobs: CurrentJobs, owner: Owner) -> Review:
    """Remove a review with its rows and all answers; the answer is what it was. The job stays."""
    return await run_in_threadpool(jobs.reviews.delete, review_id, owner=owner)


@router.post(
    "/{review_id}/next",
    summary="The next row to answer",
    responses=_SENT,
    openapi_extra=accepts(TurnRequest, _TURN),
)
async def next_row(
    review_id: str,
    body: Annotated[TurnRequest, Depends(json_body(TurnRequest))],
    jobs: CurrentJobs,
    owner: Owner,
) -> ReviewStep:
    """A row that nobody else gets for ten minutes, unless it wants several answers."""
    return await run_in_threadpool(jobs.reviews.next, review_id, body.reviewer, owner=owner)


@router.post(
    "/{review_id}/answers",
    summary="Answer a row",
    responses=_SENT,
    openapi_extra=accepts(AnswerRequest, {**_TURN, "number": 0, "preferred": "a"}),
)
async def answer_row(
    review_id: str,
    body: Annotated[AnswerRequest, Depends(json_body(AnswerRequest))],
    jobs: CurrentJobs,
    owner: Owner,
    key: KeyName,
) -> ReviewStep:
    """Keep the answer with its reviewer, API key and time, and hand out the next row."""
    return await run_in_threadpool(
        jobs.reviews.answer,
        review_id,
        body.reviewer,
        body.number,
        body.preferred,
        owner=owner,
        key=key,
    )


@router.post(
    "/{review_id}/undo",
    summary="Withdraw the last answer",
    responses=_SENT,
    openapi_extra=accepts(TurnRequest, _TURN),
)
async def undo_answer(
    review_id: str,
    body: Annotated[TurnRequest, Depends(json_body(TurnRequest))],
    jobs: CurrentJobs,
    owner: Owner,
    key: KeyName,
) -> ReviewStep:
    """Withdraw this person's last answer, which stays in the store, and hand out its row again."""
    return await run_in_threadpool(
        jobs.reviews.undo, review_id, body.reviewer, owner=owner, key=key
    )


@router.get(
    "/{review_id}/answers",
    summary="Download the answers",
    response_class=Response,
    responses={
        **documented(404, 503),
        200: _JSONL,
    },
)
async def download_answers(review_id: str, jobs: CurrentJobs, owner: Owner) -> Response:
    """The answers that stand, with texts, reviewer, time and the annotator's label.

    `cwpo review import` makes labelled pairs of them.
    """
    answers = await run_in_threadpool(jobs.reviews.answers, review_id, owner=owner)
    lines = "".join(f"{answer.model_dump_json()}\n" for answer in answers)
    headers = {"Content-Disposition": f'attachment; filename="{review_id}.answers.jsonl"'}
    return Response(lines, media_type="application/x-ndjson", headers=headers)
