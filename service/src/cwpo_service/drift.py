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

WINDOW = 10_000
# Fewer confidences say little about their distribution.
FEWEST = 200


class ConfidenceDrift(Collector):
    """Distance of the last WINDOW confidences from the quantiles in annotator.json.

    With Q(u) the quantile function of the window and R(u) that of the held-out pairs it is the
    first Wasserstein distance, the integral of |Q(u) - R(u)| over u in [0, 1], by the trapezoid
    rule over the grid of annotator.json (u = 0, 0.1, ..., 1). It is in units of confidence: 0 for
    the same distribution, 0.1 if confidence has moved by 0.1 on average, at most 1.
    """

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
        grid = np.linspace(0, 1, len(self._reference))
        quantiles = np.quantile(self._recent[: min(self._seen, WINDOW)], grid)
        gaps = np.abs(quantiles - self._reference)
        return float((gaps[:-1] + gaps[1:]).mean() / 2)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauge, where there is a distance."""
        distance = self.distance()
        if distance is not None:
            yield GaugeMetricFamily(
                "cwpo_confidence_drift",
                "Wasserstein distance of recent confidence from that on held-out pairs",
                value=distance,
            )
