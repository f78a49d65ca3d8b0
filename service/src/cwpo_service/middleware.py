"""What surrounds every request: id, limit of the body, count, log line, trace, last resort."""

from __future__ import annotations

import re
import time
import uuid
import zlib
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cwpo_service import logs
from cwpo_service.logs import is_probe
from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError, unexpected
from cwpo_service.problems import answer as problem
from cwpo_service.settings import ServeSettings

if TYPE_CHECKING:
    from cwpo_service.traces import Traces

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# zlib's way to say "gzip, with the largest window".
_GZIP = 31
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Envelope:
    """ASGI middleware around the whole app."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, traces: Traces | None
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {}).update(request_id=request_id, begun=begun)
        body = LimitedBody(receive, scope, self._limit(scope))
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            if self._is_elsewhere(scope):
                request = Request(scope)
                detail = f"there is nothing at {request.url.path} on this port"
                await problem(request, 404, detail)(scope, receive, answer)
            else:
                await self._app(scope, body.receive, answer)
        except Exception as error:
            if status:
                raise
            await unexpected(Request(scope), error)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            ended = time.perf_counter()
            seconds = ended - begun
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            logs.access(method, route, status, seconds, scope["state"])
            if self._traces is not None and not is_probe(route):
                self._traces.record(Request(scope), method, route, status, begun, ended)

    def _is_elsewhere(self, scope: Scope) -> bool:
        """Whether what is asked for is at another port: probes have one of their own, or none."""
        port = self._settings.health_port
        return port is not None and (scope["server"][1] == port) != is_probe(scope["path"])

    def _limit(self, scope: Scope) -> int:
        is_upload = scope["path"] == "/files"
        return self._settings.max_file_bytes if is_upload else self._settings.max_body_bytes


class LimitedBody:
    """A request's body, inflated if it came compressed, that may not be longer than a limit."""

    def __init__(self, receive: Receive, scope: Scope, limit: int) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self._declared = int(length) if length.isdecimal() else 0
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._encoding = headers.get("content-encoding", "identity").strip().lower()
        self._inflation = zlib.decompressobj(_GZIP) if self._encoding == "gzip" else None

    async def receive(self) -> Message:
        """The next part.

        Raises: ProblemError, 413, at the first byte over the limit; 415 for an encoding other than
            gzip; 400 for a body that is no gzip.
        """
        if self._declared > self._limit:
            raise self._too_large()
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        body = message.get("body", b"")
        if self._encoding != "identity":
            is_last = not message.get("more_body", False)
            body = self._inflate(body, is_last)
            message = {**message, "body": body}
        self._size += len(body)
        if self._size > self._limit:
            raise self._too_large()
        return message

    def _inflate(self, data: bytes, is_last: bool) -> bytes:
        if self._inflation is None:
            raise ProblemError(
                415,
                f"send Content-Encoding: gzip or none, not {self._encoding}",
                reason="invalid",
                headers={"Accept-Encoding": "gzip"},
            )
        try:
            # One byte over the limit tells enough, however far a bomb would go on.
            body = self._inflation.decompress(data, self._limit - self._size + 1)
        except zlib.error as error:
            raise _no_gzip() from error
        has_more = self._inflation.unconsumed_tail or self._inflation.unused_data
        if len(body) + self._size <= self._limit and (
            has_more or (is_last and not self._inflation.eof)
        ):
            raise _no_gzip()
        return body

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"the body is over {self._limit:,} bytes", reason="too_large")


def _no_gzip() -> ProblemError:
    return ProblemError(
        400, "the body is not the one gzip member it claims to be", reason="invalid"
    )


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
