"""The FastAPI app, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING

from fastapi import FastAPI

from cwpo.errors import CwpoError
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.base import BackendUnavailableError
from cwpo_service import contract, problems
from cwpo_service.allowance import Allowance
from cwpo_service.auth import Keyring
from cwpo_service.inference import Inference
from cwpo_service.jobs import Jobs
from cwpo_service.metrics import Metrics
from cwpo_service.middleware import Envelope
from cwpo_service.routes import annotate, files, health, jobs, model, openrlhf
from cwpo_service.service import Service
from cwpo_service.settings import ServeSettings
from cwpo_worker import errors as job_errors

if TYPE_CHECKING:
    from cwpo_service.traces import Traces

# Status and reason of what the worker package raises; the first that fits counts.
_STATUSES: dict[type[CwpoError], tuple[int, str]] = {
    job_errors.UnknownFileError: (404, "unknown"),
    job_errors.UnknownJobError: (404, "unknown"),
    job_errors.InputRefusedError: (403, "forbidden"),
    job_errors.FileInUseError: (409, "conflict"),
    job_errors.IllegalTransitionError: (409, "conflict"),
    job_errors.IdempotencyConflictError: (409, "conflict"),
    job_errors.QueueUnavailableError: (503, "queue"),
    job_errors.StoreError: (503, "store"),
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
        annotator_factory: loads the annotator; called on the device thread once the app is up.
        loader: loads the one that POST /model names; that of the settings if not given.
        traces: of the requests; closed with the app.
    Raises: ConfigError for an API key file that is none.
    """
    metrics = Metrics()
    service = Service(
        settings=settings,
        metrics=metrics,
        keyring=Keyring.read(settings.api_keys_file),
        allowance=Allowance(settings.requests_per_minute),
        inference=Inference(settings, metrics),
        jobs=Jobs.open(settings),
        loader=loader or settings.load_annotator,
    )

    if service.jobs is not None:
        metrics.watch_jobs(service.jobs.ledger)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.inference.load(annotator_factory))
        yield
        loading.cancel()
        service.inference.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="cwpo",
        summary="Confidence-weighted preference annotation",
        version=version("cwpo-service"),
        lifespan=lifespan,
        openapi_tags=contract.TAGS,
        generate_unique_id_function=attrgetter("name"),
    )
    app.state.service = service
    app.add_middleware(Envelope, settings=settings, metrics=metrics, traces=traces)
    problems.install(app, _STATUSES)
    for routes in (annotate, openrlhf, model, files, jobs, health):
        app.include_router(routes.router)
    contract.install(app)
    return app
