"""Traces of requests, through the SDK of OpenTelemetry and its exporter in memory."""

import subprocess
import sys

import pytest

from harness import TIMEOUT

export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
sdk = pytest.importorskip("opentelemetry.sdk.trace")

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def traced(serve):
    from cwpo_service.telemetry.traces import Traces

    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    with serve(traces=Traces(provider)) as service:
        yield service, exporter


@pytest.fixture
def spans(traced):
    """`spans(lambda http: ...)`: the spans of what it asks, by name."""
    service, exporter = traced

    def of(ask):
        exporter.clear()
        ask(service.http)
        # Spans are made once the answer is out: the next answer comes after them.
        service.http.get("/health/ready")
        return {span.name: span for span in exporter.get_finished_spans()}

    return of


def annotate(http, **headers):
    row = {"prompt": "a secret", "response_a": "told", "response_b": "kept"}
    answer = http.post("/annotate", json={"triplets": [row, row]}, headers=headers)
    assert answer.status_code == 200


def test_a_request_has_a_span_and_one_for_each_stage_within(spans):
    found = spans(annotate)
    assert set(found) == {"POST /annotate", "tokenise", "queue", "inference"}
    request = found.pop("POST /annotate")
    assert request.parent is None
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["cwpo.items"] == 2
    assert request.attributes["cwpo.tokens"] == 4
    for stage in found.values():
        assert stage.parent.span_id == request.context.span_id
        assert request.start_time <= stage.start_time <= stage.end_time <= request.end_time


def test_a_traceparent_makes_it_part_of_the_callers_trace(spans):
    found = spans(lambda http: annotate(http, traceparent=f"00-{TRACE}-{PARENT}-01"))
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    assert f"{found['POST /annotate'].parent.span_id:016x}" == PARENT


def test_a_trace_that_the_caller_does_not_sample_is_not_recorded(spans):
    assert not spans(lambda http: annotate(http, traceparent=f"00-{TRACE}-{PARENT}-00"))


def test_a_refusal_is_traced_and_a_probe_is_not(spans):
    found = spans(lambda http: http.post("/annotate", json={}))
    assert found["POST /annotate"].attributes["http.response.status_code"] == 422
    assert not spans(lambda http: http.get("/health/live"))


def test_no_text_of_a_client_is_in_a_span(spans):
    def ask(http):
        annotate(http)
        http.post("/annotate", json={"triplets": [{"prompt": "a secret", "told": 1}]})

    assert not any(
        "secret" in span.to_json() or "told" in span.to_json() for span in spans(ask).values()
    )


@pytest.mark.slow
def test_without_the_extra_the_command_says_how_to_get_it():
    # None in sys.modules is how Python says that a package cannot be imported.
    program = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; "
        "sys.argv = ['cwpo', 'serve', '--backend', 'null', '--traces']; "
        "from cwpo.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode
    assert "cwpo-service[otel]" in done.stderr
