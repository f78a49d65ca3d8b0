"""GET /model and POST /model."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends

from cwpo.types import ModelInfo, SwapRequest
from cwpo_service.auth import authenticated, scoped
from cwpo_service.body import accepts, json_body
from cwpo_service.problems import documented
from cwpo_service.service import CurrentService

router = APIRouter(tags=["annotate"], responses=documented(401, 422, 429, 500))


@router.get(
    "/model",
    summary="What is loaded",
    dependencies=[Depends(authenticated)],
    responses=documented(503),
)
async def model(service: CurrentService) -> ModelInfo:
    """The annotator and the limits of this service."""
    return service.inference.info()


@router.post(
    "/model",
    summary="Change the model",
    dependencies=[scoped("admin")],
    responses=documented(400, 403, 409, 413, 415, 503),
    openapi_extra=accepts(
        SwapRequest,
        {
            "annotator": "acme/helpfulness-annotator",
            "golden": [
                {
                    "prompt": "Where is Paris?",
                    "response_a": "In France.",
                    "response_b": "Who knows.",
                    "preferred": "a",
                }
            ],
        },
    ),
)
async def swap_model(
    body: Annotated[SwapRequest, Depends(json_body(SwapRequest))], service: CurrentService
) -> ModelInfo:
    """Load another annotator beside the present one, check it, and answer by it from now on.

    The answer comes when it serves. Requests under way are answered by the annotator they began
    with; every answer names the one that made it. An annotator that cannot be loaded, or labels a
    golden triplet otherwise, leaves the present one in place.
    """
    await service.inference.swap(partial(service.loader, body.annotator), body.golden)
    return service.inference.info()
