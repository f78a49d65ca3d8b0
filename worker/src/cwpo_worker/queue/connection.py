"""The connection to Redis or Valkey."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from cwpo.errors import first_line
from cwpo.keepalive import TCP_OPTIONS
from cwpo_worker.errors import QueueUnavailableError

_SCHEMES = {"valkey://": "redis://", "valkeys://": "rediss://"}


_KEEPALIVE: dict[str, Any] = {
    "socket_keepalive": True,
    "socket_keepalive_options": TCP_OPTIONS,
}


def standard_url(url: str) -> str:
    """The URL as Redis's clients read it, which know no scheme of Valkey's."""
    for scheme, known in _SCHEMES.items():
        if url.startswith(scheme):
            return known + url.removeprefix(scheme)
    return url


def connect(url: str, *, timeout: float | None = None) -> redis.Redis:
    """A client that returns bytes; it opens no connection before its first command.

    Args:
        url: `redis://[[user]:password@]host[:port][/db]`, `rediss://` for TLS (also `valkey://`
            and `valkeys://`), or `unix://`. TLS trusts the system's certificate authorities, or
            those of `?ssl_ca_certs=FILE`; `ssl_certfile` and `ssl_keyfile` name a client
            certificate.
        timeout: seconds to wait for an answer; None waits without limit.
    Raises: QueueUnavailableError for an invalid URL.
    """
    try:
        # A socket of the same machine knows no options of TCP.
        keepalive = {} if url.startswith("unix:") else _KEEPALIVE
        return redis.Redis.from_url(
            standard_url(url), socket_timeout=timeout, socket_connect_timeout=timeout, **keepalive
        )
    except ValueError as error:
        raise QueueUnavailableError(
            f"--redis-url is not a URL of Redis: {first_line(error)}"
        ) from error


@contextmanager
def queue_errors() -> Iterator[None]:
    """Convert errors of Redis to QueueUnavailableError, without the password in the URL."""
    try:
        yield
    except redis.AuthenticationError as error:
        raise QueueUnavailableError(
            f"the job queue does not accept the user or password of --redis-url "
            f"(CWPO_REDIS_URL): {first_line(error)}"
        ) from error
    except redis.RedisError as error:
        raise QueueUnavailableError(f"the job queue cannot be used: {first_line(error)}") from error
