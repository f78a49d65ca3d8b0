"""A house of the harness, around a service that can be made to fail."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwpo.process import die_with_parent, free_port
from harness import TIMEOUT, House, UnsteadyService


@pytest.fixture(scope="session")
def running_service() -> Iterator[UnsteadyService]:
    service = UnsteadyService()
    yield service
    service.stop()


@pytest.fixture
def service(running_service: UnsteadyService) -> Iterator[UnsteadyService]:
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
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert server.poll() is None
        with suppress(httpx2.TransportError):
            httpx2.get(url, timeout=5)
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
def make_house(tmp_path: Path, service: UnsteadyService) -> Iterator[Callable[..., House]]:
    """`make_house(store_url)`: a house of the test's own, without workers."""
    with ExitStack() as stack:

        def make(store_url: str | None = None) -> House:
            house = House(tmp_path, service, store_url)
            stack.callback(house.close)
            return house

        yield make


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many rows in a shard, so that a few thousand rows make several."""
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 2048)


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
def open_house(tmp_path_factory, running_service: UnsteadyService) -> Iterator[House]:
    """A house for all tests, with a worker in it."""
    folder = tmp_path_factory.mktemp("house")
    house = House(folder, running_service)
    house.start_worker()
    yield house
    house.close()
    shutil.rmtree(folder)
