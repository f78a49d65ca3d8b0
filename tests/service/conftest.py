"""A real service on a real socket, in a thread of the test process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from cwpo.types import ModelRef
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from harness import TIMEOUT, RunningService, furnished, serving


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


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """A service with the null annotator."""
    with serving() as service:
        yield service


@pytest.fixture(scope="session")
def serve():
    """`with serve(factory, **settings) as service`: a service of one's own."""
    return serving


@pytest.fixture(scope="session")
def furnish():
    """`with furnish(folder, factory, **settings) as house`: a service that takes jobs."""
    return furnished


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

    def read(response: httpx2.Response) -> dict[str, Any]:
        assert response.headers["content-type"] == "application/problem+json"
        body = response.json()
        assert body["status"] == response.status_code
        assert body["title"]
        assert response.headers["x-request-id"]
        return body

    return read
