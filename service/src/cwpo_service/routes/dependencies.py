"""FastAPI dependencies of the routes: the parts of the service, and the caller's API key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, params

from cwpo_service.access.keys import ADMIN, Key, Scope, presented_secret
from cwpo_service.problems import ProblemError
from cwpo_service.state import JobStores, Service


async def current_service(request: Request) -> Service:
    """The service that handles the request."""
    service: Service = request.app.state.service
    return service


CurrentService = Annotated[Service, Depends(current_service)]


async def configured_jobs(service: CurrentService) -> JobStores:
    """Access to files and jobs. Raises: ProblemError, 503 if the service has no job queue."""
    if service.jobs is None:
        raise ProblemError(
            503,
            "this service has no job queue: start it with --redis-url and --store-url, "
            "or use `cwpo up`",
            reason="no_jobs",
        )
    return service.jobs


CurrentJobs = Annotated[JobStores, Depends(configured_jobs)]


async def authenticated(request: Request) -> Key | None:
    """The caller's API key; None if the service requires no keys.

    Raises: ProblemError, 401 for a missing or unknown key; 429 for a key over its rate limit.
    """
    service = await current_service(request)
    keyring = service.keys.keyring
    if not keyring.keys:
        return None
    secret = presented_secret(request.headers)
    key = keyring.find(secret) if secret else None
    if key is None:
        raise ProblemError(
            401,
            "the API key is missing or unknown: send it as `Authorization: Bearer KEY`",
            reason="unauthorized",
            headers={"WWW-Authenticate": "Bearer"},
        )
    request.state.key = key.name
    await service.rate_limit.take(key.name)
    return key


def scoped(scope: Scope) -> params.Depends:
    """A dependency of calls that need the scope.

    Raises: ProblemError, as `authenticated` does, and 403 for a key without the scope.
    """

    async def check(request: Request) -> None:
        request.state.caller = key = await authenticated(request)
        if key is not None and not key.may(scope):
            raise ProblemError(
                403,
                f"this call needs the scope {scope}, which the API key {key.name} does not have",
                reason="forbidden",
            )

    marker: params.Depends = Depends(check)
    return marker


async def _owner(request: Request) -> str | None:
    key: Key | None = request.state.caller
    return None if key is None or ADMIN in key.scopes else key.name


# Owner of the files and jobs that the caller may see: the name of its key, or None for all.
Owner = Annotated[str | None, Depends(_owner)]
