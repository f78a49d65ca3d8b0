"""The connection to Redis or Valkey."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from cwpo_worker.errors import QueueUnavailableError

_SCHEMES = {"valkey://": "redis://", "valkeys://": "rediss://"}


def connect(url: str, *, timeout: float | None = None) -> redis.Redis:
    """A client that answers bytes; it opens no connection before its first command.

    Args:
        url: `redis://[[user]:password@]host[:port][/db]`, `rediss://` for TLS (also `valkey://`
            and `valkeys://`), or `unix://`. TLS trusts the system's authorities, or those of
            `?ssl_ca_certs=FILE`; `ssl_certfile` and `ssl_keyfile` name a client's certificate.
        timeout: seconds that an answer may take; None for as long as it takes.
    Raises: QueueUnavailableError for a URL that is none.
    """
    for scheme, known in _SCHEMES.items():
        if url.startswith(scheme):
            url = known + url.removeprefix(scheme)
    try:
        return redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
    except ValueError as error:
        raise QueueUnavailableError(f"--redis-url: {error}") from error


@contextmanager
def queue_errors() -> Iterator[None]:
    """Turn what goes wrong with Redis into QueueUnavailableError, without the URL's password."""
    try:
        yield
    except redis.AuthenticationError as error:
        raise QueueUnavailableError(
            f"the job queue does not accept the user or password of --redis-url "
            f"(CWPO_REDIS_URL): {error}"
        ) from error
    except redis.RedisError as error:
        raise QueueUnavailableError(f"the job queue cannot be used: {error}") from error
