"""Cancels the work for a request whose client has gone or whose deadline has passed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from cwpo_service.problems import ProblemError

T = TypeVar("T")


async def _deadline(request: Request) -> float | None:
    given = request.headers.get("x-request-timeout")
    if given is None:
        return None
    try:
        seconds = _TIMEOUT.validate_python(given)
    except ValidationError as error:
        place = {"loc": ("header", "x-request-timeout")}
        raise RequestValidationError([{**found, **place} for found in error.errors()]) from None
    begun: float = request.state.begun
    return begun + seconds


_TIMEOUT = TypeAdapter(Annotated[float, Field(gt=0, le=86_400)])
# For the documentation.
DEADLINE: dict[str, Any] = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "description": "seconds after which the answer is of no use",
    "schema": _TIMEOUT.json_schema(),
}

# Time at which the request expires, in seconds of time.perf_counter; None for never.
Deadline = Annotated[float | None, Depends(_deadline)]


async def while_awaited(
    request: Request, deadline: float | None, work: Coroutine[Any, Any, T]
) -> T:
    """Await the work, but cancel it when the client disconnects or the deadline passes.

    The request's body must have been read already.
    Args:
        deadline: in seconds of time.perf_counter; None for no deadline.
    Raises: ClientDisconnect if the client disconnects; ProblemError, 504 at the deadline.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        left = None if deadline is None else max(deadline - time.perf_counter(), 0.0)
        await asyncio.wait((task, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise ProblemError(
            504, "not answered within the X-Request-Timeout of the request", reason="deadline"
        )
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
