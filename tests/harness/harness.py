"""A service with its queue, its store and its workers: real servers and processes, on this machine.

Client, service and worker are tested in it. `serving` is a service alone, in a thread of the test;
`House` has a queue, a store and workers around whatever service it is given; `Up` is `cwpo up`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import httpx2
import psutil
import pyarrow.parquet as pq
import redis
import rq
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cwpo import Annotation, Client, Triplet
from cwpo.datasets.weighted import weighted_row
from cwpo.types import (
    FINAL_STATES,
    AnnotateRequest,
    AnnotateResponse,
    Certificate,
    JobRequest,
    RankItem,
    RankRequest,
    RankResponse,
    Usage,
)
from cwpo_annotator import Annotator
from cwpo_service.app import create_app
from cwpo_service.server import Server, listen_all, ports_of
from cwpo_service.settings import ServeSettings
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.queue.valkey import EmbeddedValkey
from cwpo_worker.steps.annotate import annotate_shard
from cwpo_worker.steps.merge import merge_parts
from cwpo_worker.steps.plan import plan_file
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import FileCatalog
from cwpo_worker.upkeep.reconciler import Reconciler

# Seconds after which a test gives up what it waits for. They cost nothing where all goes well, and
# a loaded machine may need many.
TIMEOUT = 120.0


def labels_of(triplets: Sequence[Triplet], annotator: Path | None = None) -> list[Annotation]:
    """What an annotator says of them without a service, by default the null one."""
    loaded = Annotator.null() if annotator is None else Annotator.load(str(annotator))
    return loaded.annotate(triplets)


def certified_annotator() -> Annotator:
    """The null annotator with a certificate of max_error 0.1 for confidences above 0.6."""
    null = Annotator.null()
    certificate = Certificate(
        max_error=0.1, delta=0.05, threshold=0.6, coverage=0.4, pairs=400, errors=24
    )
    return Annotator(null.encoder, null.backend, null.model, certificates=[certificate])


def url_in(line: str) -> str:
    """The url in the line with which a service says that it is ready."""
    urls = [word for word in line.split() if word.startswith("http://")]
    assert urls, f"it is not ready, but says {line!r}"
    return urls[0]


def lives(process: psutil.Process) -> bool:
    """Whether it does anything: whoever reaps it may be late."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class HasUrl(Protocol):
    url: str


@dataclass
class RunningService:
    """A service that listens."""

    url: str
    health_url: str
    app: FastAPI
    server: Server
    thread: threading.Thread
    http: httpx2.Client

    def annotate(self, *triplets: dict[str, Any], **body: Any) -> httpx2.Response:
        return self.http.post("/annotate", json={"triplets": list(triplets), **body})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


@contextmanager
def serving(
    factory: Callable[[], Annotator] = Annotator.null,
    *,
    loader: Callable[[str], Annotator] | None = None,
    traces: Any = None,
    wait: bool = True,
    **settings: Any,
) -> Iterator[RunningService]:
    """A service with these settings, by default of the null annotator."""
    asked = ServeSettings(backend="null", port=0, **settings)
    listeners = listen_all(asked.host, asked.port, asked.health_port)
    chosen = asked.with_ports(ports_of(listeners))
    app = create_app(chosen, factory, loader, traces)
    server = Server(app, chosen.drain_seconds)
    thread = threading.Thread(target=server.serve_on, args=listeners, daemon=True)
    thread.start()
    with httpx2.Client(base_url=chosen.url, timeout=TIMEOUT) as http:
        service = RunningService(chosen.url, chosen.health_url, app, server, thread, http)
        try:
            while wait and http.get(f"{service.health_url}/health/ready").status_code != 200:
                assert thread.is_alive()
            yield service
        finally:
            service.stop()
            for listener in listeners:
                listener.close()


class UnsteadyService:
    """POST /annotate and /rank and GET /model, by the null annotator, and what can go wrong."""

    def __init__(self) -> None:
        self.annotator = Annotator.null()
        self.reset()
        app = FastAPI()
        app.post("/annotate")(self._annotate)
        app.post("/rank")(self._rank)
        app.get("/model")(self._model)
        config = uvicorn.Config(app, port=0, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def reset(self) -> None:
        self.model = self.annotator.model
        self.unavailable = False
        self.keys = None
        self.poison = None
        self.on_poison = None
        self.max_body_bytes = 1 << 30
        self.gate = threading.Event()
        self.gate.set()
        self.closes_at = None
        self.requests = 0
        self.prompts: list[list[Any]] = []

    def stop(self) -> None:
        self.gate.set()
        self._server.should_exit = True
        self._thread.join()

    def _model(self) -> JSONResponse:
        limits = {"max_length": 1, "max_triplets": 512, "max_body_bytes": self.max_body_bytes}
        backend = {"backend": "null", "device": "cpu", "dtype": "float32"}
        return JSONResponse({**self.model.model_dump(), **backend, **limits})

    def _annotate(self, request: Request, body: AnnotateRequest) -> JSONResponse:
        refusal = self._refusal(request, body.triplets)
        if refusal is not None:
            return refusal
        assert body.priority == "batch"
        answer = AnnotateResponse(
            annotations=self.annotator.annotate(body.triplets, body.truncation),
            model=self.model,
            usage=Usage(triplets=len(body.triplets), tokens=0),
        )
        return JSONResponse(answer.model_dump(mode="json", exclude_none=True))

    def _rank(self, request: Request, body: RankRequest) -> JSONResponse:
        refusal = self._refusal(request, body.items)
        if refusal is not None:
            return refusal
        assert body.priority == "batch"
        answer = RankResponse(
            rankings=self.annotator.rank(body.items, body.truncation),
            model=self.model,
            usage=Usage(triplets=len(body.items), tokens=0),
            temperature=self.annotator.temperature,
        )
        return JSONResponse(answer.model_dump(mode="json", exclude_none=True))

    def _refusal(self, request: Request, rows: Sequence[Triplet | RankItem]) -> JSONResponse | None:
        self.requests += 1
        self.prompts.append([row.prompt for row in rows])
        if self.requests == self.closes_at:
            self.gate.clear()
        self.gate.wait(TIMEOUT)
        if self.unavailable:
            return _problem(503, "loading")
        pin = request.headers.get("x-model-revision")
        if pin not in (None, self.model.revision):
            detail = f"this replica hosts {self.model.revision}, not {pin}"
            return _problem(503, detail, reason="model_revision")
        if self.keys is not None and request.headers.get("authorization") not in self.keys:
            return _problem(401, "the API key is unknown")
        if int(request.headers["content-length"]) > self.max_body_bytes:
            return _problem(413, f"over {self.max_body_bytes} bytes")
        if self.poison is not None and any(row.prompt == self.poison for row in rows):
            if self.on_poison is None:
                return _problem(500, "the device is on fire")
            self.on_poison()
        return None


def _problem(status: int, detail: str, **more: str) -> JSONResponse:
    body = {"title": "problem", "status": status, "detail": detail, **more}
    return JSONResponse(body, status, headers={"Retry-After": "0"})


class House:
    """A queue and a store in a folder, and workers that ask the service.

    Args:
        service: what they ask, by default nobody until it is set: one that takes jobs itself can
            only start when the queue is there.
        api_key: theirs, where the service asks for one.
    """

    def __init__(
        self,
        folder: Path,
        service: HasUrl | None = None,
        store_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.store_folder = folder / "store"
        self.store_url = store_url or str(self.store_folder)
        self.api_key = api_key
        self.valkey = EmbeddedValkey(folder / "valkey")
        self.valkey.start()
        self.redis = redis.Redis.from_url(self.valkey.url)
        self.store = BlobStore(self.store_url)
        self.files = FileCatalog(self.store)
        self.lifecycle = Lifecycle(self.redis, self.store)
        self.queue = self.lifecycle.queue
        self.registry = self.lifecycle.registry
        self.finished = self.lifecycle.finished
        self.ledger = Ledger(self.redis, self.store, self.lifecycle, self.files)
        self.workers: list[subprocess.Popen[bytes]] = []
        if service is not None:
            self.move_in(service)

    def move_in(self, service: HasUrl) -> None:
        self.service = service
        self.client = Client(service.url, self.api_key, max_retries=0)

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def environment(self) -> dict[str, str]:
        """What a worker has to be told."""
        told = {
            "CWPO_URL": self.url,
            "CWPO_REDIS_URL": self.valkey.url,
            "CWPO_STORE_URL": self.store_url,
        }
        return told if self.api_key is None else {**told, "CWPO_API_KEY": self.api_key}

    def start_worker(self, *flags: str, stderr: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(
            [sys.executable, "-m", "cwpo", "worker", *flags],
            env={**os.environ, **self.environment},
            stderr=stderr,
            start_new_session=True,
        )
        self.workers.append(worker)
        return worker

    def work(self) -> None:
        """Let a worker do all that is queued."""
        assert self.start_worker("--burst").wait(TIMEOUT) == 0

    def end_after_this_shard(self, worker: subprocess.Popen[bytes]) -> None:
        """Tell the worker to end, and wait until its task knows."""
        worker.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + TIMEOUT
        # RQ notes it after the worker has told its task.
        while not any(each.shutdown_requested_date for each in rq.Worker.all(self.redis)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill the worker with all its children."""
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    @staticmethod
    def rows(count: int) -> list[dict[str, Any]]:
        """Rows whose texts, and so whose labels, are all different."""
        texts = {"prompt": "question {}?", "response_a": "yes {}", "response_b": "no {} 😀"}
        return [
            {"id": f"row-{i}", **{name: text.format(i) for name, text in texts.items()}}
            for i in range(count)
        ]

    @staticmethod
    def expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The weighted dataset that the null annotator makes of the rows."""
        triplets = [Triplet(**row) for row in rows]
        pairs = zip(triplets, labels_of(triplets), strict=True)
        return [weighted_row(*pair) for pair in pairs]

    def upload(self, data: bytes, format: str = "jsonl", owner: str | None = None) -> str:
        upload = self.files.receive(format, owner=owner, idempotency_key=None)
        upload.write(data)
        return upload.commit().id

    def submit(
        self,
        data: bytes | list[dict[str, Any]],
        format: str = "jsonl",
        owner: str | None = None,
        **request: object,
    ) -> str:
        if isinstance(data, list):
            data = "".join(json.dumps(row) + "\n" for row in data).encode()
        file_id = self.upload(data, format, owner)
        asked = JobRequest(file_id=file_id, **request)
        return self.ledger.submit(asked, owner=owner, idempotency_key=None).id

    def submit_files(
        self, *files: list[dict[str, Any]], owner: str | None = None, **request: object
    ) -> str:
        """Submit a job for several files of these rows."""
        lines = ["".join(json.dumps(row) + "\n" for row in rows) for rows in files]
        file_ids = [self.upload(text.encode(), owner=owner) for text in lines]
        asked = JobRequest(file_ids=file_ids, **request)
        return self.ledger.submit(asked, owner=owner, idempotency_key=None).id

    def plan(self, job_id: str, file: int = 0) -> None:
        plan_file(self.lifecycle, self.store, job_id, file)

    def annotate(self, job_id: str, index: int) -> None:
        annotate_shard(self.lifecycle, self.store, self.client, job_id, index)

    def merge(self, job_id: str) -> None:
        merge_parts(self.lifecycle, self.store, job_id)

    def reconcile(self, kept: timedelta | None = None, redis_url: str | None = None) -> None:
        """One round, as a worker does it; redis_url: another way to the queue than the house's."""
        connection = self.redis if redis_url is None else redis.Redis.from_url(redis_url)
        lifecycle = Lifecycle(connection, self.store)
        ledger = Ledger(connection, self.store, lifecycle, self.files)
        Reconciler(connection, self.store, lifecycle, ledger, kept).reconcile()

    def wait(self, job_id: str, seconds: float = TIMEOUT):
        return self.wait_for(job_id, lambda job: job.state in FINAL_STATES, seconds)

    def wait_for(self, job_id: str, reached, seconds: float = TIMEOUT):
        deadline = time.monotonic() + seconds
        while True:
            job = self.ledger.get(job_id, owner=None)
            if reached(job):
                return job
            assert time.monotonic() < deadline, f"{job} after {seconds} s"
            time.sleep(0.05)

    def results(self, job_id: str) -> list[dict[str, Any]]:
        stream, size, *_ = self.ledger.open_results(job_id, "jsonl", owner=None)
        with stream:
            data = stream.read()
        assert len(data) == size
        rows = [json.loads(line) for line in data.splitlines()]
        with self.ledger.open_results(job_id, "parquet", owner=None).stream as stream:
            table = pq.read_table(stream)
        assert table.to_pylist() == rows
        return rows

    def errors(self, job_id: str) -> list[dict[str, Any]]:
        with self.ledger.open_errors(job_id, owner=None).stream as stream:
            return [json.loads(line) for line in stream]

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                self.kill(worker)
        if hasattr(self, "client"):
            self.client.close()
        self.redis.close()
        self.valkey.stop()


@contextmanager
def furnished(
    folder: Path,
    factory: Callable[[], Annotator] = Annotator.null,
    *,
    api_key: str | None = None,
    loader: Callable[[str], Annotator] | None = None,
    **settings: Any,
) -> Iterator[House]:
    """A house around a service that takes jobs."""
    house = House(folder, api_key=api_key)
    try:
        places = {"redis_url": house.valkey.url, "store_url": house.store_url}
        with serving(factory, loader=loader, **places, **settings) as service:
            house.move_in(service)
            yield house
    finally:
        house.close()


class Up:
    """A `cwpo up` process over a folder; started again, it has the same url."""

    def __init__(self, data_dir: Path, *flags: str, **environment: str) -> None:
        self.data_dir = data_dir
        self._command = [sys.executable, "-m", "cwpo", "up", "--data-dir", str(data_dir), *flags]
        self._environment = {**os.environ, **environment}
        self.url = self._start(port=0)

    def start(self) -> None:
        assert self._start(int(self.url.rsplit(":", 1)[1])) == self.url

    def _start(self, port: int) -> str:
        """Its url, once it is ready."""
        self.process = subprocess.Popen(
            [*self._command, "--port", str(port)],
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        line = self.process.stdout.readline()
        assert line.startswith("cwpo up: ")
        return url_in(line)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, name: str) -> psutil.Process | None:
        """The one child with this in its command line, None without."""
        for child in self.children():
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(child.cmdline()):
                    return child
        return None

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=TIMEOUT)

    def close(self) -> None:
        """Kill what is left."""
        if self.process.poll() is None:
            children = self.children()
            self.process.kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.communicate()
