"""The HTTP server: uvicorn, which answers all accepted requests before it stops."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from cwpo.errors import CwpoError
from cwpo.types import ModelInfo
from cwpo_service.state import Service

_BACKLOG = 2048
# Longer than clients and proxies keep an idle connection (httpx2 5 s, load balancers 60 s): whoever
# closes first must be the client, or a request can arrive on a connection that is being closed.
_KEEP_ALIVE_SECONDS = 75
# Time after the drain for downloads and uploads that are in progress.
_LAST_SECONDS = 3.0


class ListenError(CwpoError):
    """The service cannot listen on an address."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ListenError if the port is in use or the address is invalid."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's delay off for sockets of it only.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = "is in use: choose another --port, or 0 for a free one"
        else:
            reason = f"cannot be listened on: {error.strerror or error}"
        raise ListenError(f"{host}:{port} {reason}") from error
    return listener


def listen_all(host: str, port: int, health_port: int | None = None) -> list[socket.socket]:
    """A listening socket for the service's port and, if given, one for the port of its probes.

    Raises: ListenError, after closing any socket that it opened.
    """
    listeners = [listen(host, port)]
    if health_port is not None:
        try:
            listeners.append(listen(host, health_port))
        except ListenError:
            listeners[0].close()
            raise
    return listeners


def ports_of(listeners: Iterable[socket.socket]) -> list[int]:
    """The port of each listening socket, also if the system chose it."""
    return [listener.getsockname()[1] for listener in listeners]


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, answers all accepted requests, and returns.

    While it drains it keeps listening, so that probes see a service that is not ready rather than
    one that is broken.

    Args:
        drain_seconds: seconds to answer accepted requests after the signal.
        on_ready: called once, when the annotator is loaded, with the description of the model.
    """

    def __init__(
        self,
        app: FastAPI,
        drain_seconds: float,
        on_ready: Callable[[ModelInfo], None] | None = None,
    ) -> None:
        super().__init__(
            # No log_config: uvicorn's log goes to the same handler as ours.
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )
        self._service: Service = app.state.service
        self._drain_seconds = drain_seconds
        self._on_ready = on_ready

    def serve_on(self, *listeners: socket.socket) -> None:
        """Serve on the listening sockets. Raises: CwpoError if the annotator cannot be loaded."""
        self.run(sockets=list(listeners))
        if self._service.hosting.failure is not None:
            raise self._service.hosting.failure

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop, because of a signal or because the annotator cannot be loaded."""
        hosting = self._service.hosting
        if self._on_ready is not None and hosting.state == "ready":
            self._on_ready(self._service.model_info())
            self._on_ready = None
        return await super().on_tick(counter) or hosting.failure is not None

    async def main_loop(self) -> None:
        """Serve until `on_tick` asks to stop, then drain."""
        await super().main_loop()
        deadline = time.monotonic() + self._drain_seconds
        drained = asyncio.create_task(self._service.admission.drain(self._drain_seconds))
        while not drained.done() and not self.force_exit:
            await asyncio.wait((drained,), timeout=0.1)
        left = max(deadline - time.monotonic(), _LAST_SECONDS)
        self.config.timeout_graceful_shutdown = round(left)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT; unlike uvicorn, exit with 0 after a clean stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
