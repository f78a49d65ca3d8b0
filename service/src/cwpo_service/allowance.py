"""How often a key may ask."""

from __future__ import annotations

import math
import time

from cwpo_service.problems import ProblemError


class Allowance:
    """A bucket of requests for each key, filled at a steady rate up to a minute's worth.

    Args:
        per_minute: requests a minute; None for no limit.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> None:
        """Count a request of the key. Raises: ProblemError, 429, when its bucket is empty."""
        if self._per_minute is None:
            return
        rate = self._per_minute / 60
        now = time.monotonic()
        left, since = self._buckets.get(name, (float(self._per_minute), now))
        left = min(left + (now - since) * rate, self._per_minute)
        if left < 1:
            raise ProblemError(
                429,
                f"the API key {name} may make {self._per_minute:,} requests a minute",
                reason="rate_limited",
                retry_after=math.ceil((1 - left) / rate),
            )
        self._buckets[name] = (left - 1, now)
