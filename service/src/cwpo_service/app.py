"""Builds the FastAPI app from the parts of the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING

from fastapi import FastAPI

from cwpo.errors import CwpoError
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.base import BackendUnavailableError
from cwpo_service import contract, problems
from cwpo_service.access.hosts import AllowedHosts
from cwpo_service.http.middleware import RequestMiddleware
from cwpo_service.routes import annotate, files, health, jobs, model, openrlhf, pages, reviews
from cwpo_service.scoring.loading import load_annotator
from cwpo_service.settings import ServeSettings
from cwpo_service.state import Service
from cwpo_worker.errors import (
    DamagedRecordError,
    DatasetFormError,
    FileInUseError,
    FileQuotaError,
    IdempotencyConflictError,
    IllegalTransitionError,
    InputRefusedError,
    NothingToUndoError,
    NoUncertainRowError,
    QueueUnavailableError,
    RecoveringError,
    StoreError,
    StoreFullError,
    UnknownFileError,
    UnknownJobError,
    UnknownPartError,
    UnknownReviewError,
    WaitingRowsError,
)

if TYPE_CHECKING:
    from cwpo_service.telemetry.traces import Traces

# HTTP status and reason of expected errors; the first matching class counts.
_STATUSES: dict[type[CwpoError], tuple[int, str]] = {
    UnknownFileError: (404, "unknown"),
    RecoveringError: (503, "recovering"),
    UnknownJobError: (404, "unknown"),
    UnknownPartError: (404, "unknown"),
    UnknownReviewError: (404, "unknown"),
    NoUncertainRowError: (409, "conflict"),
    NothingToUndoError: (409, "conflict"),
    InputRefusedError: (403, "forbidden"),
    DamagedRecordError: (500, "record"),
    FileInUseError: (409, "conflict"),
    IllegalTransitionError: (409, "conflict"),
    DatasetFormError: (409, "conflict"),
    IdempotencyConflictError: (409, "conflict"),
    QueueUnavailableError: (503, "queue"),
    FileQuotaError: (413, "quota"),
    WaitingRowsError: (429, "quota"),
    StoreFullError: (507, "full"),
    StoreError: (503, "store"),
    BackendUnavailableError: (503, "backend"),
}


def create_app(
    settings: ServeSettings,
    annotator_factory: Callable[[], Annotator],
    loader: Callable[[str], Annotator] | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """The service as an ASGI app.

    Args:
        settings: all settings, since every part of the service is built here.
        annotator_factory: loads the first annotator; called on the device thread at startup.
        loader: loads the annotator that POST /model names; by default, on the backend that the
            settings choose.
        traces: records the requests; closed with the app. By default nothing is recorded.
    Raises: ConfigError for an API key file that cannot be read.
    """
    service = Service.build(settings, loader or partial(load_annotator, settings))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        loading = asyncio.create_task(
            service.hosting.load_first(annotator_factory, settings.annotator)
        )
        yield
        loading.cancel()
        service.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="cwpo",
        summary="Confidence-weighted preference annotation",
        version=version("cwpo-service"),
        lifespan=lifespan,
        # Those of FastAPI load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_tags=contract.TAGS,
        generate_unique_id_function=attrgetter("name"),
    )
    app.state.service = service
    app.add_middleware(
        RequestMiddleware,
        metrics=service.metrics,
        traces=traces,
        hosts=AllowedHosts(settings.answered_hosts),
        health_port=settings.health_port,
        max_body_bytes=settings.max_body_bytes,
        max_file_bytes=settings.max_file_bytes,
    )
    problems.install(app, _STATUSES, service.metrics.count_failure)
    for routes in (annotate, openrlhf, model, files, jobs, reviews, health, pages):
        app.include_router(routes.router)
    contract.install(app)
    return app
