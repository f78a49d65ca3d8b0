"""GET /model and POST /model."""

from __future__ import annotations

import socket
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from cwpo.types import MAX_GOLDEN, ModelChange, ModelInfo, SwapRequest
from cwpo_annotator.checkpoint import HeldOut, Objective
from cwpo_service.http.body import json_body
from cwpo_service.problems import documented
from cwpo_service.routes.dependencies import CurrentService, authenticated, scoped
from cwpo_service.routes.documentation import accepts
from cwpo_service.telemetry.drift import FEWEST

router = APIRouter(tags=["annotate"], responses=documented(401, 422, 429, 500))


class Drift(BaseModel):
    """How far recent confidences are from those on the held-out pairs."""

    distance: float | None = Field(
        description="cwpo_confidence_drift, from 0 to 1; none without confidence_quantiles, or "
        "with fewer than `fewest` annotations"
    )
    annotations: int = Field(description="recent annotations that it compares")
    fewest: int = Field(description="annotations that it needs")


class AnnotatorCard(BaseModel):
    """Where the annotator comes from, how good it was, and whether its input is as it was then.

    Only what its annotator.json records; a reward model from elsewhere has nothing but the drift.
    """

    base_model: str | None = None
    objective: Objective | None = None
    labelled_pairs: int | None = Field(None, description="pairs that it was trained on")
    calibration_pairs: int | None = Field(None, description="pairs its temperature was fitted on")
    data_fingerprint: str | None = Field(None, description="of the labelled pairs")
    held_out: HeldOut | None = Field(None, description="measured on pairs it was not trained on")
    drift: Drift


@router.get(
    "/model",
    summary="What is loaded",
    dependencies=[Depends(authenticated)],
    responses=documented(503),
)
async def model(service: CurrentService) -> ModelInfo:
    """The annotator and the limits of this service."""
    return service.model_info()


@router.get(
    "/model/card",
    summary="How good it is",
    dependencies=[Depends(authenticated)],
    responses=documented(503),
)
async def model_card(service: CurrentService) -> AnnotatorCard:
    """The annotator's training, its accuracy and calibration on held-out pairs, and drift now."""
    card = service.hosting.annotator.card
    drift = service.metrics.drift
    known = set(AnnotatorCard.model_fields) - {"drift"}
    return AnnotatorCard(
        **({} if card is None else {name: getattr(card, name) for name in known}),
        drift=Drift(distance=drift.distance(), annotations=drift.observed, fewest=FEWEST),
    )


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
