"""GET /model and POST /model."""

from __future__ import annotations

import socket
from typing import Annotated

from fastapi import APIRouter, Depends

from cwpo.types import MAX_GOLDEN, ModelChange, ModelInfo, SwapRequest
from cwpo_service.http.body import json_body
from cwpo_service.problems import documented
from cwpo_service.routes.dependencies import CurrentService, authenticated, scoped
from cwpo_service.routes.documentation import accepts

router = APIRouter(tags=["annotate"], responses=documented(401, 422, 429, 500))


@router.get(
    "/model",
    summary="What is loaded",
    dependencies=[Depends(authenticated)],
    responses=documented(503),
)
async def model(service: CurrentService) -> ModelInfo:
    """The annotator and the limits of this service."""
    return service.model_info()


@router.post(
    "/model",
    summary="Change the model of this replica",
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
    body: Annotated[SwapRequest, Depends(json_body(SwapRequest, max_items=MAX_GOLDEN))],
    service: CurrentService,
) -> ModelChange:
    """Load another annotator beside the present one, check it, and answer by it from now on.

    This changes one replica: the one that answers, which `replica` names. All others keep their
    annotator, and after a restart this one has again what it is configured with. To change a fleet,
    change its configuration, and let a rolling update replace the replicas.

    The answer comes when it serves. Requests under way are answered by the annotator they began
    with; every answer names the one that made it. Work that is pinned to the former revision, such
    as a batch job, gets 503 here, and waits for a replica that hosts it. An annotator that cannot
    be loaded, or labels a golden triplet otherwise, leaves the present one in place.
    """
    service.admission.check_open()
    await service.hosting.swap(body.annotator, body.golden)
    return ModelChange(**service.model_info().model_dump(), replica=socket.gethostname())
