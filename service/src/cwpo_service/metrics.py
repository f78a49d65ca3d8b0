"""What the service tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from cwpo_annotator.labels import Labels
from cwpo_service.drift import ConfidenceDrift
from cwpo_service.job_metrics import JobMetrics
from cwpo_worker.ledger import Ledger

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = tuple(2.0**power for power in range(0, 15, 2))
_TOKENS = tuple(2.0**power for power in range(4, 21, 2))


class ConfidenceHistogram(Collector):
    """How sure the annotator is, in tenths; counted an answer at a time, not a row at a time."""

    def __init__(self) -> None:
        self._counts = np.zeros(11, np.int64)
        self._sum = 0.0

    def observe(self, values: NDArray[np.float32]) -> None:
        """Count confidences in [0, 1]."""
        # A bucket holds what is at most its bound, so bins are open on the left; 0 is below all.
        bins = np.ceil(values * 10).astype(np.intp)
        self._counts += np.bincount(bins, minlength=11)
        self._sum += float(values.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The histogram as it stands."""
        totals = [float(total) for total in np.cumsum(self._counts)[1:]]
        bounds = [f"{bound / 10:.1f}" for bound in range(1, 11)]
        buckets = [*zip(bounds, totals, strict=True), ("+Inf", totals[-1])]
        yield HistogramMetricFamily(
            "cwpo_confidence", "Confidence of annotations", buckets=buckets, sum_value=self._sum
        )


class Metrics:
    """All measures of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cwpo_requests",
            "Answered requests",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "cwpo_request_seconds",
            "From the request's headers to the last byte of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.failures = Counter(
            "cwpo_failures", "Refused requests and items", ["reason"], registry=self.registry
        )
        self.tokenise_seconds = self._histogram(
            "cwpo_tokenise_seconds", "Encoding of a request", _SECONDS
        )
        self.queue_seconds = self._histogram(
            "cwpo_queue_seconds", "From a request's queueing to its first batch", _SECONDS
        )
        self.inference_seconds = self._histogram(
            "cwpo_inference_seconds", "Scoring of a batch", _SECONDS
        )
        self.batch_items = self._histogram("cwpo_batch_items", "Pairs or texts a batch", _SIZES)
        self.batch_tokens = self._histogram("cwpo_batch_tokens", "Tokens a batch", _TOKENS)
        self.annotations = self._counter("cwpo_annotations", "Annotated triplets")
        self.ties = self._counter("cwpo_ties", "Annotations without a preference")
        self.truncations = self._counter("cwpo_truncations", "Annotations of a cut prompt")
        self.confidence = ConfidenceHistogram()
        self.drift = ConfidenceDrift()
        self.registry.register(self.confidence)
        self.registry.register(self.drift)

    def watch_queue(self, tokens: Callable[[], float], age: Callable[[], float]) -> None:
        """Read the gauges of what waits from the queue itself."""
        self._gauge("cwpo_queue_tokens", "Tokens that wait to be scored", tokens)
        self._gauge("cwpo_queue_age_seconds", "How long the first in line has waited", age)

    def watch_jobs(self, ledger: Ledger) -> None:
        """Read the measures of batch jobs from their ledger."""
        self.registry.register(JobMetrics(ledger))

    def watch_padding(self, share: Callable[[], float]) -> None:
        """Read the gauge of padding from the backend."""
        self._gauge("cwpo_padding_share", "Share of padding in the last batch", share)

    def count(self, labels: Labels) -> None:
        """Count one answer's annotations."""
        for _, _, error in labels.failed:
            self.failures.labels(error.code).inc()
        self.annotations.inc(len(labels.named))
        self.ties.inc(labels.preferred.count("tie"))
        self.truncations.inc(sum([truncated for _, truncated in labels.named]))
        self.confidence.observe(labels.confidence)
        self.drift.observe(labels.confidence)

    def render(self) -> bytes:
        """The text that Prometheus scrapes; it may wait for the job queue."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, registry=self.registry)

    def _gauge(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        Gauge(name, documentation, registry=self.registry).set_function(value)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)
