"""A moving average of measurements."""

from __future__ import annotations

_MEMORY = 0.8


class MovingAverage:
    """An exponential moving average, in which each new value has a weight of 0.2.

    Args:
        initial: value of the average before the first measurement, which replaces it.
    """

    def __init__(self, initial: float = 0.0) -> None:
        self.value = initial
        self._is_empty = True

    def add(self, value: float) -> None:
        """Add a measurement."""
        self.value = value if self._is_empty else _MEMORY * self.value + (1 - _MEMORY) * value
        self._is_empty = False
