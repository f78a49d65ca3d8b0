"""Probes and metrics; they need no key."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from cwpo_service.problems import documented
from cwpo_service.service import CurrentService

router = APIRouter(tags=["operate"], responses=documented(500))


class Health(BaseModel):
    """The answer of a probe that is content."""

    status: Literal["ok"] = "ok"


@router.get("/health/live", summary="Is it alive?", responses=documented(503))
async def live(service: CurrentService) -> Health:
    """Fails only when the service has to be restarted."""
    service.inference.check_alive()
    return Health()


@router.get("/health/ready", summary="Does it take work?", responses=documented(503))
async def ready(service: CurrentService) -> Health:
    """Fails while loading, while draining, and without the backend or the stores of jobs."""
    service.inference.check_accepting()
    service.inference.check_alive()
    await run_in_threadpool(service.inference.annotator.backend.check)
    if service.jobs is not None:
        await run_in_threadpool(service.jobs.check)
    return Health()


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(service: CurrentService) -> Response:
    """Requests, failures, queue, batches, times, confidences, batch jobs."""
    text = await run_in_threadpool(service.metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
