"""What the routes of one service share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from cwpo_annotator.annotator import Annotator
from cwpo_service.allowance import Allowance
from cwpo_service.auth import Keyring
from cwpo_service.inference import Inference
from cwpo_service.jobs import Jobs
from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError
from cwpo_service.settings import ServeSettings


@dataclass(frozen=True)
class Service:
    """The parts of a running service."""

    settings: ServeSettings
    metrics: Metrics
    keyring: Keyring
    allowance: Allowance
    inference: Inference
    jobs: Jobs | None
    loader: Callable[[str], Annotator]


async def current_service(request: Request) -> Service:
    """The service that the request came to."""
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(current_service)]


async def configured_jobs(service: CurrentService) -> Jobs:
    """Files and jobs. Raises: ProblemError, 503 where the service has none."""
    if service.jobs is None:
        raise ProblemError(
            503,
            "this service has no job queue: start it with --redis-url and --store-url, "
            "or use `cwpo up`",
            reason="no_jobs",
        )
    return service.jobs


CurrentJobs = Annotated[Jobs, Depends(configured_jobs)]
