"""What an API key may store, and how many of its rows may wait."""

import json
from hashlib import sha256

import httpx2
import pytest

from harness import TIMEOUT

KEYS = {"alice": "wonderland", "bob": "builder", "admin": "root", "cwpo-worker": "ant"}
ROW = {"prompt": "question?", "response_a": "yes", "response_b": "no"}
LINE = json.dumps(ROW).encode() + b"\n"


@pytest.fixture
def house(furnish, tmp_path):
    keys = tmp_path / "keys"
    lines = [f"{name}:{sha256(key.encode()).hexdigest()}\n" for name, key in KEYS.items()]
    keys.write_text("".join(lines))
    quotas = {"key_file_bytes": 10 * len(LINE), "key_waiting_rows": 5}
    with furnish(tmp_path, api_key=KEYS["cwpo-worker"], api_keys_file=keys, **quotas) as house:
        yield house


@pytest.fixture
def alice(house):
    headers = {"X-API-Key": KEYS["alice"]}
    with httpx2.Client(base_url=house.url, headers=headers, timeout=TIMEOUT) as http:
        yield http


@pytest.fixture
def people(house, alice):
    clients = {
        name: httpx2.Client(base_url=house.url, headers={"X-API-Key": KEYS[name]}, timeout=TIMEOUT)
        for name in ("bob", "admin")
    }
    yield {"alice": alice, **clients}
    for client in clients.values():
        client.close()


def upload(http, rows, **headers):
    headers = {"Content-Type": "application/x-ndjson", **headers}
    return http.post("/files", content=LINE * rows, headers=headers)


def submit(http, file_id, **headers):
    return http.post("/jobs", json={"file_id": file_id}, headers=headers)


def test_files_beyond_the_quota_of_a_key_are_refused_until_others_are_deleted(people, problem):
    alice = people["alice"]
    first = upload(alice, 6).json()
    refused = upload(alice, 5)
    assert refused.status_code == 413
    assert f"alice may store {4 * len(LINE):,} more" in problem(refused)["detail"]
    # Quotas are those of each key, and an admin has none.
    assert upload(people["bob"], 10).status_code == 201
    assert upload(people["admin"], 20).status_code == 201
    assert upload(alice, 4).status_code == 201
    assert upload(alice, 1).status_code == 413
    alice.delete(f"/files/{first['id']}")
    assert upload(alice, 6).status_code == 201


def test_an_upload_that_does_not_say_its_size_is_broken_off_at_the_quota(alice, house, problem):
    chunks = (LINE for _ in range(11))
    refused = alice.post("/files", content=chunks, headers={"Content-Type": "application/x-ndjson"})
    assert refused.status_code == 413
    assert "may store" in problem(refused)["detail"]
    assert upload(alice, 10).status_code == 201


def test_a_retry_of_an_upload_does_not_count_twice(alice):
    key = {"Idempotency-Key": "once"}
    first, again = upload(alice, 8, **key), upload(alice, 8, **key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert upload(alice, 2).status_code == 201


@pytest.mark.slow
def test_a_key_with_enough_rows_waiting_may_submit_no_more(house, people, problem):
    alice = people["alice"]
    file = upload(alice, 6).json()["id"]
    job = submit(alice, file, **{"Idempotency-Key": "first"}).json()
    house.plan(job["id"])
    refused = submit(alice, file)
    assert refused.status_code == 429
    assert "6 rows" in problem(refused)["detail"]
    assert "limit of 5" in problem(refused)["detail"]
    assert int(refused.headers["retry-after"]) >= 1
    # The same submission again is no further job.
    assert submit(alice, file, **{"Idempotency-Key": "first"}).json()["id"] == job["id"]
    assert submit(people["bob"], upload(people["bob"], 1).json()["id"]).status_code == 201
    house.work()
    assert submit(alice, file).status_code == 201
