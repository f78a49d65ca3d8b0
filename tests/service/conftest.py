"""A real service on a real socket, in a thread of the test process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cwpo.types import ModelRef
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_service.app import create_app
from cwpo_service.server import Server, listen_all
from cwpo_service.settings import ServeSettings

TIMEOUT = 30.0


class GatedBackend(NullBackend):
    """Scores only while its gate is open, and tells what came to it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []

    def score_pairs(self, pairs):
        self.batches.append(len(pairs))
        self.entered.release()
        assert self.gate.wait(TIMEOUT)
        return super().score_pairs(pairs)


@dataclass
class Running:
    """A service that listens."""

    url: str
    app: FastAPI
    server: Server
    thread: threading.Thread
    http: httpx.Client

    def annotate(self, *triplets: dict[str, Any], **body: Any) -> httpx.Response:
        return self.http.post("/annotate", json={"triplets": list(triplets), **body})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


@contextmanager
def running(
    factory: Callable[[], Annotator] = Annotator.null,
    *,
    loader: Callable[[str], Annotator] | None = None,
    traces: Any = None,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Running]:
    chosen = ServeSettings(backend="null", port=0, **settings)
    listeners = listen_all(chosen)
    app = create_app(chosen, factory, loader, traces)
    server = Server(app, chosen)
    thread = threading.Thread(target=server.serve_on, args=listeners, daemon=True)
    thread.start()
    with httpx.Client(base_url=chosen.url, timeout=TIMEOUT) as http:
        service = Running(chosen.url, app, server, thread, http)
        try:
            while wait and http.get(f"{chosen.health_url}/health/ready").status_code != 200:
                assert thread.is_alive()
            yield service
        finally:
            service.stop()
            for listener in listeners:
                listener.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    """A service with the null annotator."""
    with running() as service:
        yield service


@pytest.fixture(scope="session")
def serve():
    """`with serve(factory, **settings) as service`: a service of one's own."""
    return running


@pytest.fixture
def gated():
    """A backend that scores only while its gate is open; opened at the end, come what may."""
    backend = GatedBackend()
    yield backend
    backend.gate.set()


@pytest.fixture(scope="session")
def annotator_with():
    """An annotator around the backend (and encoder) of a test."""

    def build(backend: Any, encoder: Any = None) -> Annotator:
        return Annotator(encoder or NullEncoder(), backend, ModelRef(name="test", revision="1"))

    return build


@pytest.fixture(scope="session")
def triplet():
    """`triplet(3)`: a triplet's JSON object."""

    def build(number: int = 0, **fields: Any) -> dict[str, Any]:
        texts = {
            "prompt": f"question {number}",
            "response_a": f"answer {number}",
            "response_b": f"reply {number}",
        }
        return texts | fields

    return build


@pytest.fixture(scope="session")
def problem():
    """`problem(response)`: the problem in an error answer, which is checked to be one."""

    def read(response: httpx.Response) -> dict[str, Any]:
        assert response.headers["content-type"] == "application/problem+json"
        body = response.json()
        assert body["status"] == response.status_code
        assert body["title"]
        assert response.headers["x-request-id"]
        return body

    return read
