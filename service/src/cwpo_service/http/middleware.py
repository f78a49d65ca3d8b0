"""Handles every request: its id, body limit, metrics, log line, trace, and errors from bugs."""

from __future__ import annotations

import re
import time
import uuid
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cwpo_service.access.hosts import AllowedHosts
from cwpo_service.http.limited_body import LimitedBody
from cwpo_service.problems import problem_response, unexpected
from cwpo_service.telemetry import logs
from cwpo_service.telemetry.logs import is_probe
from cwpo_service.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from cwpo_service.telemetry.traces import Traces

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestMiddleware:
    """ASGI middleware around the whole app.

    Args:
        traces: records the requests; None to record nothing.
        hosts: the names in `Host` that are answered.
        health_port: port that serves the probes and metrics only, which are then not served on
            the other port; None to serve everything on one port.
        max_body_bytes: maximum size of a request's body after decompression, except for uploads.
        max_file_bytes: maximum size of an uploaded file after decompression.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        traces: Traces | None,
        hosts: AllowedHosts,
        health_port: int | None,
        max_body_bytes: int,
        max_file_bytes: int,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces
        self._hosts = hosts
        self._health_port = health_port
        self._max_body_bytes = max_body_bytes
        self._max_file_bytes = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, as ASGI defines it."""
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
            if not self._hosts.allow(Headers(scope=scope).get("host")):
                self._metrics.count_failure("host")
                detail = "the service does not answer for this Host: add it to --allowed-hosts"
                await problem_response(Request(scope), 421, detail, reason="host")(
                    scope, receive, answer
                )
            elif self._is_elsewhere(scope):
                request = Request(scope)
                detail = f"there is nothing at {request.url.path} on this port"
                await problem_response(request, 404, detail)(scope, receive, answer)
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
        """Whether the path is served on the other port, if probes have their own port."""
        port = self._health_port
        return port is not None and (scope["server"][1] == port) != is_probe(scope["path"])

    def _limit(self, scope: Scope) -> int:
        is_upload = scope["path"] == "/files"
        return self._max_file_bytes if is_upload else self._max_body_bytes


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
