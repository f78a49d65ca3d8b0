"""OpenTelemetry traces of requests, with times but never texts; needs the extra `otel`.

The spans of a request are created after it is answered, from the same timings as its log line, so
that tracing does not slow down the processing.
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

from cwpo_service.telemetry.timings import Timings

# Maximum time to send the remaining spans at the end.
_LAST_SECONDS = 3.0
_PARENT = TraceContextTextMapPropagator()


class Traces:
    """Records the spans of answered requests.

    Args:
        provider: OpenTelemetry provider that exports the spans.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("cwpo_service")

    @classmethod
    def configured(cls) -> Traces:
        """Traces that are exported by OTLP over HTTP, as the standard OTEL_* variables configure.

        Raises: ImportError if the extra `otel` is not installed.
        """
        # Imported by name, so that type checking works without the extra installed.
        sdk = import_module("opentelemetry.sdk.trace")
        batches = import_module("opentelemetry.sdk.trace.export")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        provider = sdk.TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(batches.BatchSpanProcessor(otlp.OTLPSpanExporter()))
        return cls(provider)

    def record(
        self, request: Request, method: str, route: str, status: int, begun: float, ended: float
    ) -> None:
        """Record the spans of an answered request: one for the request and one for each stage.

        If the request has a traceparent header (W3C), they become part of the caller's trace.
        Args:
            route: path template of the route, such as /jobs/{job_id}.
            status: HTTP status; 0 if the client disconnected before the answer.
            begun, ended: start and end of the request, in seconds of time.perf_counter.
        """
        epoch = time.time() - time.perf_counter()
        state: Mapping[str, Any] = request.scope["state"]
        timings: Timings | None = state.get("timings")
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.route": route,
            "cwpo.request_id": state["request_id"],
        }
        if status:
            attributes["http.response.status_code"] = status
        if timings is not None:
            attributes |= {"cwpo.items": timings.items, "cwpo.tokens": timings.tokens}
        span = self._tracer.start_span(
            f"{method} {route}",
            _PARENT.extract(request.headers),
            SpanKind.SERVER,
            attributes,
            start_time=_nanoseconds(epoch + begun),
        )
        if span.is_recording() and timings is not None:
            inside = set_span_in_context(span)
            for stage, (first, last) in timings.stages.items():
                self._tracer.start_span(stage, inside, start_time=_nanoseconds(epoch + first)).end(
                    _nanoseconds(epoch + last)
                )
        if status == 0 or status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(_nanoseconds(epoch + ended))

    def close(self) -> None:
        """Send the remaining spans; waits at most 3 seconds for an unreachable collector."""
        sending = threading.Thread(target=self._shut_down, daemon=True)
        sending.start()
        sending.join(_LAST_SECONDS)

    def _shut_down(self) -> None:
        # The interface has no shutdown method, but providers that export spans do.
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
