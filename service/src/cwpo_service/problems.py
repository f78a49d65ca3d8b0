"""Error answers: every failure becomes one problem (RFC 9457, application/problem+json)."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cwpo.errors import CwpoError, place_in
from cwpo.types import Problem

MEDIA_TYPE = "application/problem+json"
_LISTED_MISTAKES = 20
# The client is gone, so only the metrics see this status; nginx uses the same number.
_CLIENT_CLOSED = 499
# Statuses whose answers say in Retry-After when to come back.
_TEMPORARY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

logger = logging.getLogger("cwpo_service")


class Mistake(BaseModel):
    """One invalid value in a request: where it is, and what is wrong with it."""

    place: str
    detail: str


class ProblemError(CwpoError):
    """A failure that is answered with an HTTP error status.

    Args:
        status: HTTP status of the answer.
        detail: what is wrong, for the caller.
        reason: one word for programs, by which the metrics count the failure.
        retry_after: seconds after which the same request may succeed, sent as Retry-After. Up to
            half as much is added at random, so that refused clients do not all return at once.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        reason: str,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = _retry_after(retry_after)


def problem_response(
    request: Request,
    status: int,
    detail: str,
    *,
    reason: str | None = None,
    headers: dict[str, str] | None = None,
    mistakes: Sequence[Mistake] = (),
) -> Response:
    """A problem (RFC 9457) as a response; its reason is one word for programs."""
    problem = Problem(
        title=_title(status),
        status=status,
        detail=detail,
        instance=request.url.path,
        reason=reason,
    )
    body = problem.model_dump(exclude_none=True)
    if mistakes:
        body["errors"] = [mistake.model_dump() for mistake in mistakes]
    content = Problem.model_construct(**body).model_dump_json()
    return Response(content, status, headers=headers, media_type=MEDIA_TYPE)


def unexpected(request: Request, error: Exception) -> Response:
    """The answer to a bug; logs its stack, but not its message, which could quote a prompt."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    request_id = request.state.request_id
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, stack)
    return problem_response(
        request, 500, f"the service failed; its log says why under request {request_id}"
    )


def _place(location: Sequence[int | str]) -> str:
    """The place in the request, without the leading body, query or path that FastAPI adds."""
    is_within = location and location[0] in ("body", "query", "path")
    return place_in(location[1:] if is_within else location) or "body"


def mistakes_of(errors: Sequence[Any]) -> list[Mistake]:
    """The first mistakes that pydantic found, without the input, which could quote a prompt."""
    return [
        Mistake(place=_place(error["loc"]), detail=error["msg"])
        for error in errors[:_LISTED_MISTAKES]
    ]


def install(
    app: FastAPI,
    statuses: dict[type[CwpoError], tuple[int, str]],
    count: Callable[[str], None],
) -> None:
    """Make the app answer every failure with a problem.

    Args:
        statuses: HTTP status and reason of errors that other packages raise.
        count: called with the reason of every failure.
    """

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)  # noqa: S101
        count(error.reason)
        return problem_response(
            request, error.status, str(error), reason=error.reason, headers=error.headers
        )

    async def on_user_error(request: Request, error: Exception) -> Response:
        status, reason = next(
            (known for kind, known in statuses.items() if isinstance(error, kind)),
            (422, "invalid"),
        )
        count(reason)
        headers = None
        if status in _TEMPORARY:
            headers = {"Retry-After": _retry_after(5)}
        return problem_response(request, status, str(error), reason=reason, headers=headers)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        count("invalid")
        errors = error.errors()
        mistakes = mistakes_of(errors)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        detail = f"{mistakes[0].place}: {mistakes[0].detail}{more}"
        return problem_response(request, 422, detail, reason="invalid", mistakes=mistakes)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        count("http")
        detail = error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"there is nothing at {request.url.path}; /docs lists the calls"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            detail = f"{request.method} is not allowed on {request.url.path}; /docs lists the calls"
        return problem_response(
            request, error.status_code, detail, headers=dict(error.headers or {})
        )

    async def on_disconnect(request: Request, error: Exception) -> Response:
        count("client_gone")
        return Response(status_code=_CLIENT_CLOSED)

    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(CwpoError, on_user_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


def _retry_after(seconds: int) -> str:
    return str(round(seconds * random.uniform(1.0, 1.5)))  # noqa: S311 - no secret


def _title(status: int) -> str:
    return _RENAMED.get(status) or HTTPStatus(status).phrase


# As in RFC 9110; Python knows these names from 3.13 on.
_RENAMED = {413: "Content Too Large", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}

_DOCUMENTED: dict[int, str] = {
    400: "The request is not well-formed, or its body is not in its Content-Encoding.",
    401: "The API key is missing or unknown.",
    403: "The API key has not the scope that this call needs, or the input is not allowed.",
    404: "There is none of this id that the key may see.",
    409: "The state of the job or file does not allow this.",
    413: "Over a limit that the detail names.",
    415: "The Content-Type or Content-Encoding is none that this call reads.",
    416: "The range lies outside the file.",
    422: "Something in the request is invalid; `errors` names each place.",
    429: "Too much work is waiting; Retry-After says when to come back.",
    500: "The service failed; its log says why under the request id.",
    504: "Not answered within the X-Request-Timeout of the request.",
    507: "The disk of uploads is nearly full.",
    503: "Loading, draining, hosting another revision, or a store is unreachable: see `reason`.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route or router that may answer with these statuses."""
    result: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        example = {
            "type": "about:blank",
            "title": _title(status),
            "status": status,
            "detail": _DOCUMENTED[status],
        }
        schema = {"$ref": "#/components/schemas/Problem"}
        result[status] = {
            "description": _DOCUMENTED[status],
            "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
        }
        if status in _TEMPORARY:
            result[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "seconds to wait"}
            }
    return result
