"""OpenTelemetry traces of requests, for services with the extra `otel`: times, never texts.

A request's spans are made when it is answered, from the times that its log line has too, so that
nothing is spent on them in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fastapi import Request
from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cwpo_service.journey import Journey

# What is left to be sent may take so long at the end.
_LAST_SECONDS = 3.0
_PARENT = TraceContextTextMapPropagator()


class Traces:
    """Spans of answered requests, sent on by a provider.

    Args:
        provider: any; the one of `configured` takes everything from the environment.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("cwpo_service")

    @classmethod
    def configured(cls) -> Traces:
        """Traces that go, by OTLP over HTTP, where the standard OTEL_* environment says.

        Raises: ImportError without the extra.
        """
        # By name: the type checker of those who have not the extra knows nothing of it.
        sdk = import_module("opentelemetry.sdk.trace")
        batches = import_module("opentelemetry.sdk.trace.export")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        provider = sdk.TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(batches.BatchSpanProcessor(otlp.OTLPSpanExporter()))
        return cls(provider)

    def record(
        self, request: Request, method: str, route: str, status: int, begun: float, ended: float
    ) -> None:
        """The spans of a request that has been answered.

        A traceparent header (W3C) makes them part of the caller's trace.
        Args:
            status: 0 where nobody waited for the answer.
            begun, ended: in seconds of time.perf_counter.
        """
        epoch = time.time() - time.perf_counter()
        state: Mapping[str, Any] = request.scope["state"]
        journey: Journey | None = state.get("journey")
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.route": route,
            "cwpo.request_id": state["request_id"],
        }
        if status:
            attributes["http.response.status_code"] = status
        if journey is not None:
            attributes |= {"cwpo.items": journey.items, "cwpo.tokens": journey.tokens}
        span = self._tracer.start_span(
            f"{method} {route}",
            _PARENT.extract(request.headers),
            SpanKind.SERVER,
            attributes,
            start_time=_nanoseconds(epoch + begun),
        )
        if span.is_recording() and journey is not None:
            inside = set_span_in_context(span)
            for stage, (first, last) in journey.stages.items():
                self._tracer.start_span(stage, inside, start_time=_nanoseconds(epoch + first)).end(
                    _nanoseconds(epoch + last)
                )
        if status == 0 or status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_nanoseconds(epoch + ended))

    def close(self) -> None:
        """Send what has not been sent yet; a collector that is away holds nobody up for long."""
        sending = threading.Thread(target=self._shut_down, daemon=True)
        sending.start()
        sending.join(_LAST_SECONDS)

    def _shut_down(self) -> None:
        # The interface has no end; those that send have one.
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
