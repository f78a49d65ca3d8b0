"""A service, a queue, a store and workers: all real processes or servers, on this machine."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cwpo import Client, Triplet
from cwpo.datasets import weighted_row
from cwpo.process import die_with_parent, free_port
from cwpo.types import FINAL_STATES, AnnotateRequest, AnnotateResponse, JobRequest, Usage
from cwpo_annotator import Annotator
from cwpo_worker.ledger import Ledger
from cwpo_worker.store import BlobStore
from cwpo_worker.valkey import EmbeddedValkey


class Service:
    """POST /annotate over HTTP with the null annotator, and knobs for what can go wrong."""

    def __init__(self) -> None:
        self.annotator = Annotator.null()
        self.reset()
        app = FastAPI()
        app.post("/annotate")(self._annotate)
        config = uvicorn.Config(app, port=0, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def reset(self) -> None:
        self.model = self.annotator.model
        self.unavailable = False
        self.poison = None
        self.on_poison = None
        self.max_body_bytes = 1 << 30
        self.gate = threading.Event()
        self.gate.set()
        self.requests = 0

    def stop(self) -> None:
        self.gate.set()
        self._server.should_exit = True
        self._thread.join()

    def _annotate(self, request: Request, body: AnnotateRequest) -> JSONResponse:
        self.requests += 1
        self.gate.wait(30)
        if self.unavailable:
            return _problem(503, "loading")
        if int(request.headers["content-length"]) > self.max_body_bytes:
            return _problem(413, f"over {self.max_body_bytes} bytes")
        if self.poison is not None and any(row.prompt == self.poison for row in body.triplets):
            if self.on_poison is None:
                return _problem(500, "the device is on fire")
            self.on_poison()
        assert body.priority == "batch"
        answer = AnnotateResponse(
            annotations=self.annotator.annotate(body.triplets, body.truncation),
            model=self.model,
            usage=Usage(triplets=len(body.triplets), tokens=0),
        )
        return JSONResponse(answer.model_dump(mode="json", exclude_none=True))


def _problem(status: int, detail: str) -> JSONResponse:
    body = {"title": "problem", "status": status, "detail": detail}
    return JSONResponse(body, status, headers={"Retry-After": "0"})


class House:
    """A queue and a store with everything that works on them."""

    def __init__(self, folder: Path, service: Service, store_url: str | None = None) -> None:
        self.service = service
        self.store_folder = folder / "store"
        self.store_url = store_url or str(self.store_folder)
        self.valkey = EmbeddedValkey(folder / "valkey")
        self.valkey.start()
        self.redis = redis.Redis.from_url(self.valkey.url)
        self.ledger = Ledger(self.redis, BlobStore(self.store_url))
        self.client = Client(service.url, max_retries=0)
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_worker(self, *flags: str) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-c", "from cwpo.cli import main; main()", "worker"),
                *("--url", self.service.url, "--redis-url", self.valkey.url),
                *("--store-url", self.store_url, *flags),
            ],
            start_new_session=True,
        )
        self.workers.append(worker)
        return worker

    @staticmethod
    def rows(count: int) -> list[dict]:
        """Rows whose texts, and so whose labels, are all different."""
        texts = {"prompt": "question {}?", "response_a": "yes {}", "response_b": "no {} 😀"}
        return [
            {"id": f"row-{i}", **{name: text.format(i) for name, text in texts.items()}}
            for i in range(count)
        ]

    def expected(self, rows: list[dict]) -> list[dict]:
        """The weighted dataset that the rows should give."""
        triplets = [Triplet(**row) for row in rows]
        labels = self.service.annotator.annotate(triplets)
        return [weighted_row(*pair) for pair in zip(triplets, labels, strict=True)]

    def upload(self, data: bytes, format: str = "jsonl", owner: str | None = None) -> str:
        upload = self.ledger.files.receive(format, owner=owner, idempotency_key=None)
        upload.write(data)
        return upload.commit().id

    def submit(self, data: bytes | list[dict], format: str = "jsonl", **request: object) -> str:
        if isinstance(data, list):
            data = "".join(json.dumps(row) + "\n" for row in data).encode()
        file_id = self.upload(data, format)
        asked = JobRequest(file_id=file_id, **request)
        return self.ledger.submit(asked, owner=None, idempotency_key=None).id

    def wait(self, job_id: str, seconds: float = 60.0):
        return self.wait_for(job_id, lambda job: job.state in FINAL_STATES, seconds)

    def wait_for(self, job_id: str, reached, seconds: float = 60.0):
        deadline = time.monotonic() + seconds
        while True:
            job = self.ledger.get(job_id, owner=None)
            if reached(job):
                return job
            assert time.monotonic() < deadline, f"{job} after {seconds} s"
            time.sleep(0.05)

    def results(self, job_id: str) -> list[dict]:
        stream, size = self.ledger.open_results(job_id, "jsonl", owner=None)
        with stream:
            data = stream.read()
        assert len(data) == size
        rows = [json.loads(line) for line in data.splitlines()]
        with self.ledger.open_results(job_id, "parquet", owner=None)[0] as stream:
            table = pq.read_table(stream)
        assert table.to_pylist() == rows
        return rows

    def errors(self, job_id: str) -> list[dict]:
        with self.ledger.open_errors(job_id, owner=None)[0] as stream:
            return [json.loads(line) for line in stream]

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill the worker with all its children."""
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                self.kill(worker)
        self.client.close()
        self.redis.close()
        self.valkey.stop()


@pytest.fixture(scope="session")
def running_service() -> Iterator[Service]:
    service = Service()
    yield service
    service.stop()


@pytest.fixture
def service(running_service: Service) -> Iterator[Service]:
    yield running_service
    running_service.reset()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server, a process of its own that keeps everything in memory."""
    pytest.importorskip("moto", reason="moto[s3] is not installed")
    url = f"http://127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rsplit(":", 1)[1]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),  # noqa: PLW1509
    )
    wait_until_up(url, server)
    yield url
    server.terminate()
    server.wait()


def wait_until_up(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None
        with suppress(httpx.TransportError):
            httpx.get(url, timeout=5)
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody answers at {url}")


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket` of the test's own, which this process and its children find and may use."""
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def make_house(tmp_path: Path, service: Service) -> Iterator[Callable[..., House]]:
    """`make_house(store_url)`: a house of the test's own, without workers."""
    with ExitStack() as stack:

        def make(store_url: str | None = None) -> House:
            house = House(tmp_path, service, store_url)
            stack.callback(house.close)
            return house

        yield make


@pytest.fixture
def house(make_house: Callable[..., House]) -> House:
    """A house with a local store."""
    return make_house()


@pytest.fixture(scope="session")
def encoded():
    """`encoded(rows, format)`: an input file of the rows."""

    def encode(rows: list[dict], format: str) -> bytes:
        if format == "parquet":
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            return sink.getvalue()
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return gzip.compress(data) if format == "jsonl.gz" else data

    return encode


@pytest.fixture(scope="session")
def open_house(tmp_path_factory, running_service: Service) -> Iterator[House]:
    """A house for all tests, with a worker in it."""
    folder = tmp_path_factory.mktemp("house")
    house = House(folder, running_service)
    house.start_worker()
    yield house
    house.close()
    shutil.rmtree(folder)
