"""Error answers: every failure becomes one problem (RFC 9457, application/problem+json)."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cwpo.errors import CwpoError
from cwpo.types import Problem

MEDIA_TYPE = "application/problem+json"
_LISTED_MISTAKES = 20
# Nobody reads it but the metrics; the number is nginx's.
_CLIENT_CLOSED = 499

logger = logging.getLogger("cwpo_service")


class Mistake(BaseModel):
    """One thing that is wrong with a request, and where."""

    place: str
    detail: str


class ProblemError(CwpoError):
    """A failure that knows its HTTP status.

    Args:
        reason: one word for the metrics.
        retry_after: seconds after which the same request may succeed.
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
            self.headers["Retry-After"] = str(retry_after)


def answer(
    request: Request,
    status: int,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    mistakes: Sequence[Mistake] = (),
) -> Response:
    """The problem as a response."""
    problem = Problem(title=_title(status), status=status, detail=detail, instance=request.url.path)
    body = problem.model_dump(exclude_none=True)
    if mistakes:
        body["errors"] = [mistake.model_dump() for mistake in mistakes]
    content = Problem.model_construct(**body).model_dump_json()
    return Response(content, status, headers=headers, media_type=MEDIA_TYPE)


def unexpected(request: Request, error: Exception) -> Response:
    """The answer to a bug. The log has the stack but no message: that could quote a prompt."""
    stack = "".join(traceback.format_tb(error.__traceback__))
    request_id = request.state.request_id
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, stack)
    return answer(request, 500, f"the service failed; its log says why under request {request_id}")


def place(location: Sequence[int | str]) -> str:
    """A readable path: ("body", "triplets", 3, "prompt", "str") is triplets[3].prompt."""
    path = ""
    for part in location[1:] if location and location[0] in ("body", "query", "path") else location:
        if isinstance(part, int):
            path += f"[{part}]"
        # Pydantic also names the member of a union that it tried; that is no place.
        elif part != "str" and "[" not in part:
            path += f".{part}" if path else part
    return path or "body"


def mistakes_of(errors: Sequence[Any]) -> list[Mistake]:
    """What pydantic found wrong, without the input it found it in."""
    return [
        Mistake(place=place(error["loc"]), detail=error["msg"])
        for error in errors[:_LISTED_MISTAKES]
    ]


def install(app: FastAPI, statuses: dict[type[CwpoError], tuple[int, str]]) -> None:
    """Answer every failure as a problem.

    Args:
        statuses: the status and the reason of errors that other packages raise.
    """

    def count(request: Request, reason: str) -> None:
        request.app.state.service.metrics.failures.labels(reason).inc()

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)  # noqa: S101
        count(request, error.reason)
        return answer(request, error.status, str(error), headers=error.headers)

    async def on_user_error(request: Request, error: Exception) -> Response:
        status, reason = next(
            (known for kind, known in statuses.items() if isinstance(error, kind)),
            (422, "invalid"),
        )
        count(request, reason)
        headers = {"Retry-After": "5"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
        return answer(request, status, str(error), headers=headers)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        count(request, "invalid")
        errors = error.errors()
        mistakes = mistakes_of(errors)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        detail = f"{mistakes[0].place}: {mistakes[0].detail}{more}"
        return answer(request, 422, detail, mistakes=mistakes)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        count(request, "http")
        detail = error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"there is nothing at {request.url.path}; /docs lists the calls"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            detail = f"{request.method} is not among the calls of {request.url.path}; see /docs"
        return answer(request, error.status_code, detail, headers=dict(error.headers or {}))

    async def on_disconnect(request: Request, error: Exception) -> Response:
        count(request, "client_gone")
        return Response(status_code=_CLIENT_CLOSED)

    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(CwpoError, on_user_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


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
    503: "Loading, draining, or a store is unreachable; the detail says which.",
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
        if status in (429, 503):
            result[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "seconds to wait"}
            }
    return result
