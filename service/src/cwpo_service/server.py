"""Uvicorn, with our way to start and to stop."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from cwpo.errors import CwpoError
from cwpo.types import ModelInfo
from cwpo_service.service import Service
from cwpo_service.settings import ServeSettings

_BACKLOG = 2048
# Longer than clients and proxies keep an idle connection (httpx 5 s, load balancers 60 s): whoever
# closes first must be the one who asks, or a request meets a connection that is being closed.
_KEEP_ALIVE_SECONDS = 75
# What an answer may take after the drain: downloads and uploads that are under way.
_LAST_SECONDS = 3.0


class ListenError(CwpoError):
    """The address cannot be listened on."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ListenError, with the way out."""
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


def listen_all(settings: ServeSettings) -> list[socket.socket]:
    """The sockets that the settings ask for; the ports that were free to choose are set in them.

    Raises: ListenError.
    """
    listeners = [listen(settings.host, settings.port)]
    settings.port = listeners[0].getsockname()[1]
    if settings.health_port is not None:
        try:
            listeners.append(listen(settings.host, settings.health_port))
        except ListenError:
            listeners[0].close()
            raise
        settings.health_port = listeners[1].getsockname()[1]
    return listeners


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, answers what it accepted, and returns.

    While it drains it still listens, so that probes see it as not ready rather than as broken.
    `on_ready` is called once, when the annotator is loaded.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: ServeSettings,
        on_ready: Callable[[ModelInfo], None] | None = None,
    ) -> None:
        super().__init__(
            # No log_config: its log goes where ours goes.
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
        self._drain_seconds = settings.drain_seconds
        self._on_ready = on_ready

    def serve_on(self, *listeners: socket.socket) -> None:
        """Serve. Raises: CwpoError when the annotator cannot be loaded."""
        self.run(sockets=list(listeners))
        if self._service.inference.failure is not None:
            raise self._service.inference.failure

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: on a signal, or with an annotator that cannot be loaded."""
        inference = self._service.inference
        if self._on_ready is not None and inference.phase == "ready":
            self._on_ready(inference.info())
            self._on_ready = None
        return await super().on_tick(counter) or inference.failure is not None

    async def main_loop(self) -> None:
        """Serve, then drain."""
        await super().main_loop()
        deadline = time.monotonic() + self._drain_seconds
        drained = asyncio.create_task(self._service.inference.drain(self._drain_seconds))
        while not drained.done() and not self.force_exit:
            await asyncio.wait((drained,), timeout=0.1)
        left = max(deadline - time.monotonic(), _LAST_SECONDS)
        self.config.timeout_graceful_shutdown = round(left)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT; unlike uvicorn, don't die of them after a clean stop."""
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
