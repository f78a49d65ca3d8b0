"""TCP options that detect a machine that has gone silent.

A machine that loses power or its network does not close its connections, so a client would wait
until its timeout. With these options the operating system checks an idle connection every few
seconds, and closes it after half a minute without an answer.
"""

from __future__ import annotations

import socket

_IDLE_SECONDS = 10
_INTERVAL_SECONDS = 5
_PROBES = 4
_SECONDS = _IDLE_SECONDS + _PROBES * _INTERVAL_SECONDS

# By their names in the socket module; each system has some of them. TCP_KEEPALIVE is the name of
# TCP_KEEPIDLE on macOS. TCP_USER_TIMEOUT, in milliseconds, limits how long sent data may stay
# unacknowledged.
_OPTIONS = {
    "TCP_KEEPIDLE": _IDLE_SECONDS,
    "TCP_KEEPALIVE": _IDLE_SECONDS,
    "TCP_KEEPINTVL": _INTERVAL_SECONDS,
    "TCP_KEEPCNT": _PROBES,
    "TCP_USER_TIMEOUT": 1000 * _SECONDS,
}

TCP_OPTIONS: dict[int, int] = {
    getattr(socket, name): value for name, value in _OPTIONS.items() if hasattr(socket, name)
}
"""Options of the level IPPROTO_TCP."""

KEEPALIVE: list[tuple[int, int, int]] = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, option, value) for option, value in TCP_OPTIONS.items()),
]
"""All options, as arguments of socket.setsockopt."""
