"""The connection to Redis or Valkey."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.sentinel import Sentinel

from cwpo.errors import first_line
from cwpo.keepalive import TCP_OPTIONS
from cwpo_worker.errors import QueueUnavailableError

_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}
_SENTINEL, _SENTINEL_PORT = "+sentinel", 26379
_SENTINEL_SECONDS = 2.0


_KEEPALIVE: dict[str, Any] = {
    "socket_keepalive": True,
    "socket_keepalive_options": TCP_OPTIONS,
}


@dataclass(frozen=True)
class Sentinels:
    """Sentinels, and the master that they watch over, as a URL names them.

    addresses: host and port of each sentinel. name: of the master. options: of connections to it.
        The sentinels are asked without a password, and by TLS where the master is.
    """

    addresses: tuple[tuple[str, int], ...]
    name: str
    options: dict[str, Any]

    @classmethod
    def of(cls, url: str) -> Sentinels | None:
        """Those of the URL; None for the URL of a server. Raises: ValueError for a wrong one."""
        scheme, _, rest = url.partition("://")
        if not scheme.endswith(_SENTINEL):
            return None
        known = _standard(scheme.removesuffix(_SENTINEL))
        place, _, path = rest.partition("/")
        account, _, hosts = place.rpartition("@")
        name, _, database = path.partition("/")
        if known not in ("redis", "rediss") or not name:
            raise ValueError(
                "sentinels are redis+sentinel://[[user]:password@]host[:port],.../master[/db]"
            )
        user, _, password = account.partition(":")
        options = {
            "db": int(database or 0),
            "username": unquote(user) or None,
            "password": unquote(password) or None,
            "ssl": known == "rediss",
        }
        return cls(tuple(map(_address, hosts.split(","))), name, options)

    def master(self, **options: Any) -> redis.Redis:
        """A client of whichever server is the master when it connects."""
        known = self._known(Sentinel, options)
        client: redis.Redis = known.master_for(self.name, **self.options, **options)
        return client

    def pool(self, **options: Any) -> redis.asyncio.ConnectionPool:
        """Connections to whichever server is the master when they are made, for asyncio."""
        known = self._known(AsyncSentinel, options)
        client = known.master_for(self.name, **self.options, **options)
        pool: redis.asyncio.ConnectionPool = client.connection_pool
        return pool

    def _known(self, kind: Callable[..., Any], options: dict[str, Any]) -> Any:
        # A sentinel that does not answer is passed over, however long the master may take.
        times = {
            name: options[name] or _SENTINEL_SECONDS
            for name in ("socket_timeout", "socket_connect_timeout")
        }
        asking = {"ssl": self.options["ssl"], **options, **times}
        return kind(self.addresses, sentinel_kwargs=asking)


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is no address of a sentinel")
    return parts.hostname, parts.port or _SENTINEL_PORT


def _standard(scheme: str) -> str:
    return _SCHEMES.get(scheme, scheme)


def standard_url(url: str) -> str:
    """The URL as Redis's clients read it, which know no scheme of Valkey's."""
    scheme, _, rest = url.partition("://")
    return f"{_standard(scheme)}://{rest}" if rest else url


def connect(url: str, *, timeout: float | None = None) -> redis.Redis:
    """A client that returns bytes; it opens no connection before its first command.

    Args:
        url: `redis://[[user]:password@]host[:port][/db]`, `rediss://` for TLS (also `valkey://`
            and `valkeys://`), or `unix://`. TLS trusts the system's certificate authorities, or
            those of `?ssl_ca_certs=FILE`; `ssl_certfile` and `ssl_keyfile` name a client
            certificate. `redis+sentinel://[[user]:password@]host[:port],.../master[/db]` asks
            sentinels which server is the master.
        timeout: seconds to wait for an answer; None waits without limit.
    Raises: QueueUnavailableError for an invalid URL.
    """
    try:
        # A socket of the same machine knows no options of TCP.
        keepalive = {} if url.startswith("unix:") else _KEEPALIVE
        times = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        sentinels = Sentinels.of(url)
        if sentinels is not None:
            return sentinels.master(**times, **keepalive)
        return redis.Redis.from_url(standard_url(url), **times, **keepalive)
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
