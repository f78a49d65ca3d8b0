"""GET /model."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from cwpo.types import ModelInfo
from cwpo_service.auth import authenticated
from cwpo_service.problems import documented
from cwpo_service.service import CurrentService

router = APIRouter(
    tags=["annotate"],
    dependencies=[Depends(authenticated)],
    responses=documented(401, 422, 429, 500),
)


@router.get("/model", summary="What is loaded", responses=documented(503))
async def model(service: CurrentService) -> ModelInfo:
    """The annotator and the limits of this service."""
    return service.inference.info()
