"""Prometheus metrics of the service."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from cwpo_annotator.labels import Labels
from cwpo_service.telemetry.drift import ConfidenceDrift
from cwpo_service.telemetry.job_metrics import JobMetrics
from cwpo_worker.jobs.ledger import Ledger

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = tuple(2.0**power for power in range(0, 15, 2))
_TOKENS = tuple(2.0**power for power in range(4, 21, 2))


class ConfidenceHistogram(Collector):
    """Histogram of confidence in steps of 0.1; it counts all rows of an answer in one call."""

    def __init__(self) -> None:
        self._counts = np.zeros(11, np.int64)
        self._sum = 0.0

    def observe(self, values: NDArray[np.float32]) -> None:
        """Count confidences in [0, 1], shape (n,)."""
        # A bucket includes its upper bound, so bins are open on the left; 0 is below all of them.
        bins = np.ceil(values * 10).astype(np.intp)
        self._counts += np.bincount(bins, minlength=11)
        self._sum += float(values.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The current histogram."""
        totals = [float(total) for total in np.cumsum(self._counts)[1:]]
        bounds = [f"{bound / 10:.1f}" for bound in range(1, 11)]
        buckets = [*zip(bounds, totals, strict=True), ("+Inf", totals[-1])]
        yield HistogramMetricFamily(
            "cwpo_confidence",
            "Confidence of annotations, from 0 (a tie) to 1",
            buckets=buckets,
            sum_value=self._sum,
        )


class Metrics:
    """All metrics of a service, in their own Prometheus registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cwpo_requests",
            "Requests that were answered; status 0 if the client had gone before",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "cwpo_request_seconds",
            "Seconds from the headers of a request to the last byte of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.failures = Counter(
            "cwpo_failures",
            "Requests that were refused, and items in answered requests that failed",
            ["reason"],
            registry=self.registry,
        )
        self.tokenise_seconds = self._histogram(
            "cwpo_tokenise_seconds", "Seconds to tokenise the texts of one request", _SECONDS
        )
        self.queue_seconds = self._histogram(
            "cwpo_queue_seconds", "Seconds that one request waited for its first batch", _SECONDS
        )
        self.inference_seconds = self._histogram(
            "cwpo_inference_seconds", "Seconds to score one batch", _SECONDS
        )
        self.batch_items = self._histogram(
            "cwpo_batch_items", "Pairs (or single texts) in one batch", _SIZES
        )
        self.batch_tokens = self._histogram(
            "cwpo_batch_tokens", "Tokens that are read in one batch", _TOKENS
        )
        self.annotations = self._counter("cwpo_annotations", "Triplets that were labelled")
        self.ties = self._counter(
            "cwpo_ties", "Labelled triplets whose two responses scored the same"
        )
        self.truncations = self._counter(
            "cwpo_truncations", "Labelled triplets whose prompt was cut to fit the model"
        )
        self.rankings = self._counter("cwpo_rankings", "Items whose responses were ranked")
        self.confidence = ConfidenceHistogram()
        self.drift = ConfidenceDrift()
        self.registry.register(self.confidence)
        self.registry.register(self.drift)

    def watch_queue(self, tokens: Callable[[], float], age: Callable[[], float]) -> None:
        """Add the gauges of the scoring queue, whose values are read at every scrape.

        Args:
            tokens: returns the number of waiting tokens.
            age: returns the seconds that the oldest waiting request has waited.
        """
        self._gauge(
            "cwpo_queue_tokens",
            "Tokens that wait to be read, by estimate where a request is not tokenised yet",
            tokens,
        )
        self._gauge(
            "cwpo_queue_age_seconds",
            "Seconds that the longest waiting request has waited to be scored",
            age,
        )

    def watch_jobs(self, ledger: Ledger) -> None:
        """Add the metrics of batch jobs, which are read from the ledger at every scrape."""
        self.registry.register(JobMetrics(ledger))

    def watch_padding(self, share: Callable[[], float]) -> None:
        """Add the gauge of padding, whose value is read at every scrape.

        Args:
            share: returns the share of padding in the last batch, from 0 to 1.
        """
        self._gauge(
            "cwpo_padding_share",
            "Share of padding among the tokens of the last batch, from 0 to 1",
            share,
        )

    def count_failure(self, reason: str) -> None:
        """Count one refused request or failed item."""
        self.failures.labels(reason).inc()

    def count(self, labels: Labels) -> None:
        """Count the annotations and failed items of one answer."""
        for _, _, error in labels.failed:
            self.count_failure(error.code)
        self.annotations.inc(len(labels.named))
        self.ties.inc(labels.preferred.count("tie"))
        self.truncations.inc(sum([truncated for _, truncated in labels.named]))
        self.confidence.observe(labels.confidence)
        self.drift.observe(labels.confidence)

    def count_rankings(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the rankings and failed items of one answer.

        Their confidence is not part of the histogram and of the drift, which are those of triplets:
        neighbours of a ranking are more alike than two responses that were not chosen by a score.
        """
        failed = [row["error"].code for row in rows if "error" in row]
        for code in failed:
            self.count_failure(code)
        self.rankings.inc(len(rows) - len(failed))

    def render(self) -> bytes:
        """All metrics in the text format of Prometheus; this call may wait for the job queue."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, registry=self.registry)

    def _gauge(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        Gauge(name, documentation, registry=self.registry).set_function(value)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)
