"""The servers that benchmarks ask, each in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx2
import psutil

from cwpo_service.server import listen

HERE = Path(__file__).parent


@contextmanager
def server(*command: str) -> Iterator[tuple[int, psutil.Process]]:
    """Run `python COMMAND` on a free port, given as PORT; its port and process once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(port) if part == "PORT" else part for part in command]
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health/ready").is_success:
                    break
            except httpx2.TransportError:
                time.sleep(0.05)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def bare() -> AbstractContextManager[tuple[int, psutil.Process]]:
    """The least that FastAPI can do with the request."""
    return server("-P", str(HERE / "contestants" / "hashing_endpoint.py"), "PORT")


def plain() -> AbstractContextManager[tuple[int, psutil.Process]]:
    """The same work as the service's, by FastAPI alone."""
    return server("-P", str(HERE / "contestants" / "labelling_endpoint.py"), "PORT")


def ours() -> AbstractContextManager[tuple[int, psutil.Process]]:
    """The service with the null backend."""
    return server("-m", "cwpo", "serve", "--backend", "null", "--port", "PORT")


@contextmanager
def up(folder: str | Path, *arguments: str) -> Iterator[tuple[str, int]]:
    """`cwpo up ARGUMENTS` over a folder, on a free port: its URL, and the id of its process."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cwpo", "up", *arguments),
            *("--port", str(port), "--data-dir", str(folder)),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"cwpo up")
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
