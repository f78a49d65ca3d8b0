"""Probes and metrics, which need no API key."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from cwpo_service.problems import documented
from cwpo_service.routes.dependencies import CurrentService, configured_jobs

router = APIRouter(tags=["operate"], responses=documented(500))


class Health(BaseModel):
    """The answer of a probe that is content."""

    status: Literal["ok"] = "ok"


@router.get("/health/live", summary="Is it alive?", responses=documented(503))
async def live(service: CurrentService) -> Health:
    """Fails only when the service has to be restarted."""
    service.batcher.check_alive()
    return Health()


@router.get("/health/ready", summary="Does it take work?", responses=documented(422, 503))
async def ready(
    service: CurrentService,
    whom: Annotated[
        Literal["annotate", "jobs"],
        Query(alias="for", description="the calls that are to be answered"),
    ] = "annotate",
) -> Health:
    """Fails while loading, while draining, and without the backend.

    `?for=jobs` fails too while the stores of jobs cannot be reached, or no worker looks after the
    jobs: calls that annotate at once do not need them.
    """
    service.admission.check_accepting()
    service.batcher.check_alive()
    await service.backend_check.outcome()
    if whom == "jobs":
        jobs = await configured_jobs(service)
        await jobs.check.outcome()
    return Health()


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(service: CurrentService) -> Response:
    """Requests, failures, queue, batches, times, confidences, batch jobs."""
    text = await service.metrics_text.outcome()
    return Response(text, media_type=CONTENT_TYPE_LATEST)
