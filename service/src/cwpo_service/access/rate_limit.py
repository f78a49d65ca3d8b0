"""The rate limit of API keys, over all replicas that share a Redis."""

from __future__ import annotations

import logging
import math
import time

import redis.asyncio
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from cwpo.errors import first_line
from cwpo_service.problems import ProblemError
from cwpo_worker.queue.connection import Sentinels, standard_url

# The longest that a request waits for Redis, and how long Redis is not asked after a failure.
_REDIS_SECONDS = 0.25
_PAUSE_SECONDS = 5.0

logger = logging.getLogger("cwpo_service")


class RateLimit:
    """Counts the requests of each key in a sliding window of one minute.

    Without Redis, or while it is unavailable, each replica counts its own requests.
    Args:
        per_minute: maximum number of requests per minute; None for no limit.
        redis_url: URL of the Redis that the replicas share; None if there is none.
    """

    def __init__(self, per_minute: int | None, redis_url: str | None = None) -> None:
        self._limit = None if per_minute is None else RateLimitItemPerMinute(per_minute)
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared = None
        self._is_away_until = 0.0
        if per_minute is not None and redis_url is not None:
            self._shared = SlidingWindowCounterRateLimiter(_shared_storage(redis_url))

    async def take(self, name: str) -> None:
        """Count one request of the key. Raises: ProblemError, 429 if the key is over the limit."""
        if self._limit is None:
            return
        seconds = await self._wait_seconds(self._limit, name)
        if seconds is not None:
            raise ProblemError(
                429,
                f"the API key {name} is limited to {self._limit.amount:,} requests per minute",
                reason="rate_limited",
                retry_after=seconds,
            )

    async def _wait_seconds(self, limit: RateLimitItemPerMinute, name: str) -> int | None:
        if self._shared is not None and time.monotonic() >= self._is_away_until:
            try:
                return await _hit(self._shared, limit, name)
            except (RedisError, OSError) as error:
                self._is_away_until = time.monotonic() + _PAUSE_SECONDS
                logger.warning(
                    "Redis is unavailable, so rate limits count this replica only for %g s: %s",
                    *(_PAUSE_SECONDS, first_line(error)),
                )
        return await _hit(self._own, limit, name)


async def _hit(
    limiter: SlidingWindowCounterRateLimiter, limit: RateLimitItemPerMinute, name: str
) -> int | None:
    """Count a request. Returns: seconds to wait if it is over the limit, otherwise None."""
    if await limiter.hit(limit, name):
        return None
    window = await limiter.get_window_stats(limit, name)
    return min(max(math.ceil(window.reset_time - time.time()), 1), 60)


def _shared_storage(url: str) -> RedisStorage:
    times = {"socket_timeout": _REDIS_SECONDS, "socket_connect_timeout": _REDIS_SECONDS}
    sentinels = Sentinels.of(url)
    if sentinels is not None:
        pool = sentinels.pool(**times)
    else:
        pool = redis.asyncio.ConnectionPool.from_url(standard_url(url), **times)
    return RedisStorage(
        "async+redis://",
        implementation="redispy",
        key_prefix="cwpo:limits",
        connection_pool=pool,  # type: ignore[arg-type]
    )
