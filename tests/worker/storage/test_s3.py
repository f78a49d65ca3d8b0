"""The store and whole jobs on an S3 server, over HTTP."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import httpx2
import pytest

from cwpo_worker.errors import BlobNotFoundError, StoreError
from cwpo_worker.storage.store import BlobStore
from harness import TIMEOUT

LARGE = 40 << 20  # More than one request takes: it goes up in parts.


@pytest.fixture
def s3_house(make_house, s3):
    return make_house(f"{s3}/cwpo")


def test_a_large_blob_that_is_there_already_stays(s3):
    store = BlobStore(s3)
    first = os.urandom(LARGE)
    for data, published in ((first, True), (b"x" * LARGE, False), (b"small", False)):
        with store.create("k") as blob:
            blob.write(data)
        assert blob.published is published
    assert store.read("k") == first


def test_a_child_process_uses_the_store_of_its_parent(s3):
    store = BlobStore(s3)
    store.put("parent", b"1")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.put("child", store.read("parent") + b"2")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read("child") == b"12"


def test_many_readers_share_one_store(s3):
    store = BlobStore(s3)
    for number in range(8):
        store.put(f"k{number}", bytes([number]))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(store.read, [f"k{number}" for number in range(8)]))
    assert read == [bytes([number]) for number in range(8)]


def test_a_bucket_that_is_not_there_is_said(s3):
    with pytest.raises(StoreError, match="cannot write check in the store s3://no-such") as caught:
        BlobStore("s3://no-such-bucket-at-all").check()
    assert not isinstance(caught.value, BlobNotFoundError)


def test_missing_credentials_are_said_in_one_line(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    check = f"from cwpo_worker.storage.store import BlobStore; BlobStore({s3!r}).check()"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert "StoreError: cannot write check in the store s3://" in last
    assert "credentials" in last


def test_without_the_driver_the_way_to_install_it_is_said(tmp_path):
    blocked = tmp_path / "s3fs.py"
    blocked.write_text("raise ImportError('No module named s3fs')")
    command = [sys.executable, "-m", "cwpo", "worker", "--store-url", "s3://bucket", "--burst"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "the store s3://bucket cannot be used" in line
    assert "pip install 'cwpo-worker[s3]'" in line


@pytest.mark.slow
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_job_is_the_same_on_s3(s3_house, encoded, format):
    rows = s3_house.rows(5000)  # Three shards.
    job_id = s3_house.submit(encoded([*rows, {"prompt": "alone"}], format), format)
    s3_house.start_worker("--heartbeat-seconds", "3")
    job = s3_house.wait(job_id)
    assert job.state == "completed_with_errors", job.error
    assert s3_house.results(job_id) == s3_house.expected(rows)
    assert [error["row"] for error in s3_house.errors(job_id)] == [5001]


@pytest.mark.slow
def test_parts_have_presigned_urls_where_the_operator_wants_them(s3_house):
    job_id = s3_house.submit(s3_house.rows(3))
    s3_house.plan(job_id)
    s3_house.annotate(job_id, 0)
    s3_house.merge(job_id)
    (part,) = s3_house.ledger.parts(job_id, owner=None).parts
    assert part.url is None
    (part,) = s3_house.ledger.parts(job_id, owner=None, url_seconds=60).parts
    assert "X-Amz-Expires=60" in part.url or "Expires=" in part.url
    content = httpx2.get(part.url, timeout=TIMEOUT).content
    assert (len(content), sha256(content).hexdigest()) == (part.bytes, part.sha256)


@pytest.mark.slow
def test_a_killed_worker_s_job_is_finished_on_s3(s3_house):
    rows = s3_house.rows(5000)
    s3_house.service.gate.clear()
    job_id = s3_house.submit(rows)
    killed = s3_house.start_worker("--heartbeat-seconds", "3")
    s3_house.wait_for(job_id, lambda job: job.state == "running")
    s3_house.kill(killed)
    s3_house.service.gate.set()
    s3_house.start_worker("--heartbeat-seconds", "3")
    job = s3_house.wait(job_id)
    assert job.state == "completed", job.error
    assert s3_house.results(job_id) == s3_house.expected(rows)
