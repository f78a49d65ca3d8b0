"""Confidence drift: the distance of recent confidences from those on the held-out pairs.

A weak annotator fails silently on data unlike its training data (App. J.5 of the paper): it still
returns labels, but the distribution of their confidence changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cwpo_annotator.confidence import drift

WINDOW = 10_000
# Fewer confidences are too few to estimate their distribution.
FEWEST = 200


class ConfidenceDrift(Collector):
    """A Prometheus gauge: `cwpo_annotator.confidence.drift` of the last WINDOW confidences."""

    def __init__(self) -> None:
        self._recent = np.zeros(WINDOW, np.float32)
        self._seen = 0
        self._reference: Sequence[float] | None = None

    def expect(self, quantiles: Sequence[float] | None) -> None:
        """Forget all confidences, and compare later ones with these quantiles.

        Args:
            quantiles: of the confidence on the held-out pairs; None if the annotator has none.
        """
        self._reference = quantiles
        self._seen = 0

    def observe(self, values: Sequence[float] | NDArray[np.float32]) -> None:
        """Add the confidences of an answer."""
        values = values[-WINDOW:]
        self._recent[np.arange(self._seen, self._seen + len(values)) % WINDOW] = values
        self._seen += len(values)

    @property
    def observed(self) -> int:
        """Number of recent confidences, at most WINDOW."""
        return min(self._seen, WINDOW)

    def distance(self) -> float | None:
        """The drift, from 0 to 1; None without quantiles or with fewer than FEWEST confidences."""
        if self._reference is None or self._seen < FEWEST:
            return None
        return drift(self._recent[: self.observed], self._reference)

    def excess(self, limit: float) -> str | None:
        """What is wrong, and what to do, if the distance is above the limit."""
        distance = self.distance()
        if distance is None or distance <= limit:
            return None
        return (
            f"the last {self.observed:,} confidences differ by {distance:.3f} on average from "
            f"those on held-out pairs, and the limit is {limit:g} (--drift-limit): the texts are "
            "not like those that the annotator was measured on. Label some of them, and measure "
            "it with `cwpo evaluate annotator --compare-with`"
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauge; nothing while the distance is unknown."""
        distance = self.distance()
        if distance is not None:
            yield GaugeMetricFamily(
                "cwpo_confidence_drift",
                "Wasserstein distance, from 0 to 1, between the confidences of the last 10,000 "
                "annotations and those of the annotator on held-out pairs",
                value=distance,
            )
