"""What surrounds every request: its id, the limit of its body, its count, and the last resort."""

from __future__ import annotations

import re
import time
import uuid

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError, unexpected
from cwpo_service.settings import ServeSettings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Envelope:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        body = LimitedBody(receive, scope, self._limit(scope))
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, body.receive, answer)
        except Exception as error:
            if status:
                raise
            await unexpected(Request(scope), error)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - begun)

    def _limit(self, scope: Scope) -> int:
        is_upload = scope["path"] == "/files"
        return self._settings.max_file_bytes if is_upload else self._settings.max_body_bytes


class LimitedBody:
    """A request's body that may not be longer than a limit."""

    def __init__(self, receive: Receive, scope: Scope, limit: int) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        self._declared = int(length) if length.isdecimal() else 0
        self._receive = receive
        self._limit = limit
        self._size = 0

    async def receive(self) -> Message:
        """The next part. Raises: ProblemError, 413, at the first byte over the limit."""
        if self._declared > self._limit:
            raise self._too_large()
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        return message

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"the body is over {self._limit:,} bytes", reason="too_large")


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
