"""Confidence drift: how far recent answers are from what the annotator was on held-out pairs.

A weak annotator fails silently on data unlike its own (App. J.5 of the paper): its labels still
come, with a confidence that is distributed differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cwpo_annotator.confidence import drift

WINDOW = 10_000
# Fewer confidences say little about their distribution.
FEWEST = 200


class ConfidenceDrift(Collector):
    """`cwpo_annotator.confidence.drift` of the last WINDOW confidences."""

    def __init__(self) -> None:
        self._recent = np.zeros(WINDOW, np.float32)
        self._seen = 0
        self._reference: Sequence[float] | None = None

    def expect(self, quantiles: Sequence[float] | None) -> None:
        """Begin anew, with another annotator's quantiles; None where it has none."""
        self._reference = quantiles
        self._seen = 0

    def observe(self, values: Sequence[float] | NDArray[np.float32]) -> None:
        """Add confidences of answers."""
        values = values[-WINDOW:]
        self._recent[np.arange(self._seen, self._seen + len(values)) % WINDOW] = values
        self._seen += len(values)

    def distance(self) -> float | None:
        """The distance; None without quantiles, or before there are FEWEST confidences."""
        if self._reference is None or self._seen < FEWEST:
            return None
        return drift(self._recent[: min(self._seen, WINDOW)], self._reference)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauge, where there is a distance."""
        distance = self.distance()
        if distance is not None:
            yield GaugeMetricFamily(
                "cwpo_confidence_drift",
                "Wasserstein distance of recent confidence from that on held-out pairs",
                value=distance,
            )
