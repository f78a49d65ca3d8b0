import json
import os
import socket
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pyarrow.parquet as pq
import pytest

from cwpo import Triplet
from cwpo_annotator import Annotator
from harness import TIMEOUT, certified_annotator

KEYS = {"alice": "wonderland", "bob": "builder", "admin": "root", "cwpo-worker": "ant"}


@pytest.fixture(scope="module")
def office(furnish, tmp_path_factory):
    """A service with a queue and a store, where alice, bob and an admin have keys."""
    folder = tmp_path_factory.mktemp("office")
    keys = folder / "keys"
    lines = [f"{name}:{sha256(key.encode()).hexdigest()}\n" for name, key in KEYS.items()]
    keys.write_text("".join(lines))
    key = KEYS["cwpo-worker"]
    with furnish(folder, api_key=key, api_keys_file=keys, max_file_bytes=1 << 20) as office:
        yield office


@pytest.fixture(scope="module")
def valkey(office):
    return office.valkey


@pytest.fixture
def people(office):
    """A connection for each key."""
    clients = {
        name: httpx2.Client(base_url=office.url, headers={"X-API-Key": key}, timeout=TIMEOUT)
        for name, key in KEYS.items()
    }
    yield clients
    for client in clients.values():
        client.close()


@pytest.fixture
def alice(people):
    return people["alice"]


def upload(http, rows, **headers):
    body = "".join(json.dumps(row) + "\n" for row in rows)
    return http.post(
        "/files", content=body, headers={"Content-Type": "application/x-ndjson", **headers}
    )


@pytest.fixture(scope="module")
def rows(triplet):
    return [triplet(n, id=f"r{n}") for n in range(40)] + [triplet(40, id="bad", response_a=" ")]


@pytest.fixture(scope="module")
def finished(office, rows):
    """The id of a job of alice's that has ended, with one rejected row."""
    headers = {"X-API-Key": KEYS["alice"]}
    with httpx2.Client(base_url=office.url, headers=headers, timeout=TIMEOUT) as http:
        file = upload(http, rows).json()
        job = http.post("/jobs", json={"file_id": file["id"]}).json()
        assert job["state"] == "validating"
        office.work()
        done = http.get(f"/jobs/{job['id']}").json()
    assert done["state"] == "completed_with_errors"
    assert done["progress"]["rows_total"] == 41
    return job["id"]


def test_an_upload_is_kept_and_described(alice, rows):
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    answer = upload(alice, rows)
    assert answer.status_code == 201
    file = answer.json()
    assert (file["format"], file["bytes"]) == ("jsonl", len(body))
    assert file["sha256"] == sha256(body).hexdigest()
    assert alice.get(f"/files/{file['id']}").json() == file


def test_an_upload_of_another_kind_is_a_415_that_lists_the_kinds(alice, problem):
    answer = alice.post("/files", content=b"a,b", headers={"Content-Type": "text/csv"})
    assert answer.status_code == 415
    assert "application/vnd.apache.parquet" in problem(answer)["detail"]


def test_too_large_an_upload_is_a_413_and_leaves_nothing(alice, office, problem):
    chunks = (b" " * (1 << 16) for _ in range(20))
    answer = alice.post("/files", content=chunks, headers={"Content-Type": "application/x-ndjson"})
    assert answer.status_code == 413
    assert "1,048,576 bytes" in problem(answer)["detail"]
    store = office.store_url
    left = [name for _, _, names in os.walk(store) for name in names if "partial" in name]
    assert left == []


def digest_of(data):
    return f"sha-256=:{b64encode(sha256(data).digest()).decode()}:"


def stored(office):
    """Every file in the store, half-written ones too."""
    folder = Path(office.store_url)
    return {path for path in folder.rglob("*") if path.is_file() and path.name != "check"}


def test_the_checksum_of_an_upload_is_checked(alice, office, problem):
    headers = {"Content-Type": "application/x-ndjson"}
    before = stored(office)
    wrong = {**headers, "Content-Digest": digest_of(b"{}")}
    answer = alice.post("/files", content=b"{}\n", headers=wrong)
    assert answer.status_code == 422
    assert "checksum" in problem(answer)["detail"]
    assert stored(office) == before
    right = {**headers, "Content-Digest": f"md5=:AAAA:, {digest_of(b'{}')}"}
    assert alice.post("/files", content=b"{}", headers=right).status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Digest": "sha-256=abc"},
        {"Content-Digest": "md5=:1B2M2Y8AsgTpgAmY7PhCfg==:"},
        {"Content-Digest": ""},
        {"Content-Digest": digest_of(b""), "Content-Encoding": "gzip"},
    ],
)
def test_a_checksum_that_cannot_be_checked_is_refused(alice, problem, headers):
    headers = {"Content-Type": "application/x-ndjson", **headers}
    answer = alice.post("/files", content=b"", headers=headers)
    assert answer.status_code == 422
    assert problem(answer)["detail"].startswith("Content-Digest ")


@pytest.mark.parametrize("length", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_an_upload_that_breaks_off_leaves_nothing_and_can_be_tried_again(alice, office, length):
    before = stored(office)
    head = (
        f"POST /files HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEYS['alice']}\r\n{length}\r\n"
        f"Content-Type: application/x-ndjson\r\nIdempotency-Key: broken {length}\r\n\r\n"
    )
    address = urlsplit(office.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        half = b'{"half": 1}' if "Length" in length else b'b\r\n{"half": 1}\r\n'
        client.sendall(head.encode() + half)
        while stored(office) == before:  # Until the service has begun to write.
            pass
    while stored(office) != before:
        pass
    headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": f"broken {length}"}
    answers = [alice.post("/files", content=b"whole\n", headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["sha256"] == sha256(b"whole\n").hexdigest()


def test_the_idempotency_key_makes_tries_one(alice, rows, problem):
    key = {"Idempotency-Key": "one"}
    first, again = upload(alice, rows, **key).json(), upload(alice, rows, **key).json()
    assert first == again
    answer = upload(alice, rows[:1], **key)
    assert answer.status_code == 409
    assert "Idempotency-Key" in problem(answer)["detail"]
    request = {"file_id": first["id"]}
    jobs = {alice.post("/jobs", json=request, headers=key).json()["id"] for _ in range(3)}
    assert len(jobs) == 1


@pytest.mark.slow
def test_a_file_is_deleted_once_no_job_needs_it(alice, people, office, rows, problem):
    file = upload(alice, rows[:3]).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    answer = alice.delete(f"/files/{file['id']}")
    assert answer.status_code == 409
    assert job["id"] in problem(answer)["detail"]
    office.work()
    assert people["bob"].delete(f"/files/{file['id']}").status_code == 404
    assert alice.delete(f"/files/{file['id']}").json() == file
    assert alice.get(f"/files/{file['id']}").status_code == 404
    assert alice.delete(f"/files/{file['id']}").status_code == 404
    assert alice.post("/jobs", json={"file_id": file["id"]}).status_code == 404
    assert alice.get(f"/jobs/{job['id']}/results").status_code == 200


@pytest.mark.slow
def test_an_ended_job_is_deleted_with_its_results(alice, people, office, rows, problem):
    file = upload(alice, rows[:3]).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    path = f"/jobs/{job['id']}"
    answer = alice.delete(path)
    assert answer.status_code == 409
    assert "validating" in problem(answer)["detail"]
    office.work()
    assert people["bob"].delete(path).status_code == 404
    assert alice.delete(path).json()["state"] == "completed"
    for gone in (path, f"{path}/results", f"{path}/errors", f"{path}/events"):
        assert alice.get(gone).status_code == 404
    assert alice.delete(path).status_code == 404
    assert alice.post(f"{path}/resume").status_code == 404
    assert job["id"] not in [other["id"] for other in alice.get("/jobs").json()["jobs"]]
    assert alice.get(f"/files/{file['id']}").json() == file
    office.work()
    assert not os.path.exists(f"{office.store_url}{path}")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/files/file_nope"),
        ("DELETE", "/jobs/job_nope"),
        ("GET", "/files/file_nope"),
        ("GET", "/jobs/job_nope"),
        ("GET", "/jobs/job_nope/results"),
        ("GET", "/jobs/job_nope/errors"),
        ("GET", "/jobs/job_nope/events"),
        ("POST", "/jobs/job_nope/cancel"),
        ("POST", "/jobs/job_nope/resume"),
        ("GET", "/jobs/..%2F..%2Fetc"),
    ],
)
def test_what_is_not_there_is_a_404(alice, problem, method, path):
    answer = alice.request(method, path)
    assert answer.status_code == 404
    problem(answer)


def test_a_job_on_a_file_that_is_not_there_is_a_404(alice, problem):
    answer = alice.post("/jobs", json={"file_id": "nope"})
    assert answer.status_code == 404
    assert "nope" in problem(answer)["detail"]


@pytest.mark.parametrize(
    ("query", "place"), [("limit=0", "limit"), ("limit=x", "limit"), ("state=done", "state")]
)
def test_a_wrong_query_is_a_422_that_names_it(alice, problem, query, place):
    answer = alice.get(f"/jobs?{query}")
    assert answer.status_code == 422
    assert problem(answer)["detail"].startswith(f"{place}: ")


def test_a_made_up_cursor_is_a_422(alice, problem):
    answer = alice.get("/jobs?cursor=made-up")
    assert answer.status_code == 422
    problem(answer)


def test_a_key_sees_its_own_files_and_jobs_and_the_admin_all(people, finished):
    file = people["alice"].get(f"/jobs/{finished}").json()["file_id"]
    of_job = ["", "/results", "/parts", "/parts/part-00000000.parquet"]
    for path in (f"/files/{file}", *(f"/jobs/{finished}{below}" for below in of_job)):
        assert people["alice"].get(path).status_code == 200
        assert people["admin"].get(path).status_code == 200
        assert people["bob"].get(path).status_code == 404
    assert people["bob"].post(f"/jobs/{finished}/cancel").status_code == 404
    assert people["bob"].post("/jobs", json={"file_id": file}).status_code == 404
    listed = {name: people[name].get("/jobs").json()["jobs"] for name in ("bob", "admin")}
    assert finished not in [job["id"] for job in listed["bob"]]
    assert finished in [job["id"] for job in listed["admin"]]


def test_jobs_are_listed_page_by_page_newest_first(people, rows):
    bob = people["bob"]
    file = upload(bob, rows[:1]).json()
    made = [bob.post("/jobs", json={"file_id": file["id"]}).json()["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = bob.get("/jobs", params=params).json()
        assert len(page["jobs"]) <= 2
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]


def test_cancelling_stops_a_job_and_is_refused_once_it_has_ended(alice, finished, rows, problem):
    file = upload(alice, rows).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    assert alice.post(f"/jobs/{job['id']}/cancel").json()["state"] in ("cancelling", "cancelled")
    answer = alice.post(f"/jobs/{finished}/cancel")
    assert answer.status_code == 409
    assert "completed_with_errors" in problem(answer)["detail"]


def test_a_cancelled_job_is_resumed_and_a_finished_one_is_not(alice, finished, rows, problem):
    job = alice.post("/jobs", json={"file_id": upload(alice, rows).json()["id"]}).json()
    alice.post(f"/jobs/{job['id']}/cancel")
    while (answer := alice.post(f"/jobs/{job['id']}/resume")).status_code == 409:
        assert "cancelling" in problem(answer)["detail"]
    assert answer.json()["finished_at"] is None
    answer = alice.post(f"/jobs/{finished}/resume")
    assert answer.status_code == 409
    assert "completed_with_errors" in problem(answer)["detail"]


def test_results_before_the_end_are_a_409(alice, rows, problem):
    file = upload(alice, rows).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    assert alice.get(f"/jobs/{job['id']}/parts").status_code == 409
    answer = alice.get(f"/jobs/{job['id']}/results")
    assert answer.status_code == 409
    problem(answer)


def test_the_dataset_is_that_of_the_annotator(alice, finished, rows, tmp_path):
    answer = alice.get(f"/jobs/{finished}/results?format=jsonl")
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert f"{finished}.jsonl" in answer.headers["content-disposition"]
    got = [json.loads(line) for line in answer.text.splitlines()]
    expected = Annotator.null().annotate([Triplet(**row) for row in rows[:40]])
    assert [row["id"] for row in got] == [row["id"] for row in rows[:40]]
    assert [row["confidence"] for row in got] == pytest.approx(
        [annotation.confidence for annotation in expected]
    )
    path = tmp_path / "weighted.parquet"
    path.write_bytes(alice.get(f"/jobs/{finished}/results").content)
    assert [row["chosen"] for row in pq.read_table(path).to_pylist()] == [
        row["chosen"] for row in got
    ]


def test_the_checksum_of_each_file_is_stated_also_beside_a_range(alice, finished):
    (part,) = alice.get(f"/jobs/{finished}/parts").json()["parts"]
    for path in ("results", "results?format=jsonl", f"parts/{part['name']}"):
        whole = alice.get(f"/jobs/{finished}/{path}")
        digest = f"sha-256=:{b64encode(sha256(whole.content).digest()).decode()}:"
        assert whole.headers["repr-digest"] == digest
        rest = alice.get(f"/jobs/{finished}/{path}", headers={"Range": "bytes=5-"})
        assert (rest.status_code, rest.headers["repr-digest"]) == (206, digest)
    assert "repr-digest" not in alice.get(f"/jobs/{finished}/errors").headers


def test_the_parts_are_listed_and_each_is_served(alice, finished, tmp_path, problem):
    listed = alice.get(f"/jobs/{finished}/parts").json()
    (part,) = listed["parts"]
    assert (part["name"], part["rows"], listed["rows"]) == ("part-00000000.parquet", 40, 40)
    assert listed["schema"][0] == {"name": "id", "type": "string"}
    # No URL of the store: its operator has not allowed it.
    assert "url" not in part or part["url"] is None
    url = f"/jobs/{finished}/parts/{part['name']}"
    whole = alice.get(url)
    content = whole.content
    assert (len(content), sha256(content).hexdigest()) == (part["bytes"], part["sha256"])
    path = tmp_path / "part.parquet"
    path.write_bytes(content)
    lines = alice.get(f"/jobs/{finished}/results?format=jsonl").text.splitlines()
    assert pq.read_table(path).to_pylist() == [json.loads(line) for line in lines]
    rest = alice.get(url, headers={"Range": "bytes=5-", "If-Range": whole.headers["etag"]})
    assert (rest.status_code, rest.content) == (206, content[5:])
    for name in ("part-00000001.parquet", "part-0.parquet", "00000.parquet", "job.json"):
        missing = alice.get(f"/jobs/{finished}/parts/{name}")
        assert missing.status_code == 404
        assert name in problem(missing)["detail"]


def test_a_job_of_several_files_needs_all_of_them(alice, people, rows, problem):
    own = upload(alice, rows[:1]).json()["id"]
    others = upload(people["bob"], rows[:1]).json()["id"]
    answer = alice.post("/jobs", json={"file_ids": [own, others]})
    assert answer.status_code == 404
    assert others in problem(answer)["detail"]
    job = alice.post("/jobs", json={"file_ids": [own] * 1000}).json()
    assert (job["file_ids"], job["file_id"]) == ([own] * 1000, None)
    alice.post(f"/jobs/{job['id']}/cancel")
    for body in ({"file_ids": []}, {"file_ids": [own], "file_id": own}, {"file_ids": [own] * 1001}):
        assert alice.post("/jobs", json=body).status_code == 422


def test_a_cursor_of_no_page_of_parts_is_a_422(alice, finished, problem):
    answer = alice.get(f"/jobs/{finished}/parts", params={"cursor": "1"})
    assert answer.status_code == 422
    assert "next_cursor" in problem(answer)["detail"]


@pytest.mark.slow
def test_without_a_single_file_a_409_names_the_parts_and_the_command(alice, office, rows, problem):
    file = upload(alice, rows[:2]).json()
    job = alice.post("/jobs", json={"file_id": file["id"], "merge": "never"}).json()
    office.work()
    assert alice.get(f"/jobs/{job['id']}").json()["merge"] == "never"
    for format in ("parquet", "jsonl"):
        answer = alice.get(f"/jobs/{job['id']}/results", params={"format": format})
        assert answer.status_code == 409
        detail = problem(answer)["detail"]
        assert f"/jobs/{job['id']}/parts" in detail
        assert f"cwpo jobs download {job['id']} -o FOLDER/" in detail
    assert alice.get(f"/jobs/{job['id']}/parts").json()["rows"] == 2


def test_the_model_tells_up_to_where_a_dataset_is_one_file(alice, service):
    told = alice.get("/model").json()
    assert told["max_merged_rows"] > 1_000_000
    assert told["max_merged_bytes"] > 1 << 30
    # Without jobs there is nothing to merge.
    assert service.http.get("/model").json().get("max_merged_rows") is None


def test_the_rejected_rows_come_with_their_reasons(alice, finished):
    (row,) = map(json.loads, alice.get(f"/jobs/{finished}/errors").text.splitlines())
    assert row == {
        "row": 41,
        "id": "bad",
        "code": "empty_response",
        "detail": "response_a is empty",
    }


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=10-", slice(10, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=5-99999999", slice(5, None)),
    ],
)
def test_a_range_of_the_file_is_served(alice, finished, header, span):
    url = f"/jobs/{finished}/results?format=jsonl"
    whole = alice.get(url)
    assert whole.headers["accept-ranges"] == "bytes"
    part = alice.get(url, headers={"Range": header})
    assert part.status_code == 206
    assert part.content == whole.content[span]
    start, stop, _ = span.indices(len(whole.content))
    assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole.content)}"


def test_while_redis_recovers_a_job_is_not_unknown(furnish, problem, tmp_path):
    with furnish(tmp_path) as house:
        http, job_id = house.service.http, house.submit(house.rows(3))
        house.redis.flushall()
        answer = http.get(f"/jobs/{job_id}")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "restored" in problem(answer)["detail"]
        assert http.get(f"/jobs/job-{'0' * 24}").status_code == 404
        house.reconcile()
        assert http.get(f"/jobs/{job_id}").json()["state"] == "validating"


@pytest.mark.slow
def test_a_download_does_not_go_on_with_other_content(furnish, tmp_path, monkeypatch):
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 3)
    with furnish(tmp_path) as house:
        http, job_id = house.service.http, house.submit(house.rows(6))
        url = f"/jobs/{job_id}/results?format=jsonl"
        house.plan(job_id)
        house.annotate(job_id, 0)
        house.ledger.cancel(job_id, owner=None)
        house.work()
        half = http.get(url)
        assert http.get(url).headers["etag"] == half.headers["etag"]
        house.ledger.resume(job_id, owner=None)
        house.work()
        again = {"Range": "bytes=5-", "If-Range": half.headers["etag"]}
        whole = http.get(url, headers=again)
        assert (whole.status_code, len(whole.content.splitlines())) == (200, 6)
        again["If-Range"] = whole.headers["etag"]
        part = http.get(url, headers=again)
        assert (part.status_code, part.content) == (206, whole.content[5:])


@pytest.mark.parametrize("header", ["bytes=99999999-", "bytes=9-3", "bytes=-0"])
def test_a_range_outside_the_file_is_a_416(alice, finished, problem, header):
    answer = alice.get(f"/jobs/{finished}/results", headers={"Range": header})
    assert answer.status_code == 416
    assert answer.headers["content-range"].startswith("bytes */")
    problem(answer)


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "lines=1-2"},
        {"Range": "bytes=a-b"},
        {"Range": "bytes=0-1,4-5"},
        {"Range": f"bytes={'9' * 5000}-"},
        {"Range": f"bytes=-{'9' * 5000}"},
        {"Range": "bytes=\u0660-\u0661".encode()},
        {"Range": "bytes=0-9", "If-Range": '"something else"'},
    ],
)
def test_any_other_range_gives_the_whole_file(alice, finished, headers):
    url = f"/jobs/{finished}/results"
    answer = alice.get(url, headers=headers)
    assert answer.status_code == 200
    assert answer.content == alice.get(url).content


def events(http, job_id):
    """The jobs that the event stream tells, up to its end."""
    with http.stream("GET", f"/jobs/{job_id}/events", timeout=TIMEOUT) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_the_events_of_an_ended_job_are_one(alice, finished):
    assert [job["state"] for job in events(alice, finished)] == ["completed_with_errors"]


def test_a_client_that_comes_back_gets_only_what_it_has_not_seen(alice, finished):
    url = f"/jobs/{finished}/events"
    told = alice.get(url).text
    (event_id,) = [line.removeprefix("id: ") for line in told.splitlines() if line[:3] == "id:"]
    version, rows_done = map(int, event_id.split("."))
    assert rows_done == 41
    for seen in (event_id, f"{version + 1}.0"):
        answer = alice.get(url, headers={"Last-Event-ID": seen})
        assert (answer.status_code, answer.content) == (204, b"")
    for seen in (f"{version - 1}.41", f"{version}.40", "", "7", "-1.5", "9" * 30):
        assert alice.get(url, headers={"Last-Event-ID": seen}).text == told


@pytest.mark.slow
def test_no_event_is_told_twice_and_each_is_of_a_later_step(alice, office, rows):
    file = upload(alice, rows[:3]).json()
    url = f"/jobs/{alice.post('/jobs', json={'file_id': file['id']}).json()['id']}/events"
    with alice.stream("GET", url) as answer:
        first = next(answer.iter_lines()).removeprefix("id: ")
    office.work()
    told = alice.get(url, headers={"Last-Event-ID": first}).text
    assert told.count("event: job") == 1
    assert '"state":"completed"' in told
    (last,) = [line.removeprefix("id: ") for line in told.splitlines() if line[:3] == "id:"]
    assert [int(part) for part in last.split(".")] > [int(part) for part in first.split(".")]


def test_jobs_are_listed_by_when_they_were_created(alice, finished, problem):
    created = alice.get(f"/jobs/{finished}").json()["created_at"]

    def listed(**bounds):
        jobs = alice.get("/jobs", params={**bounds, "limit": 200}).json()["jobs"]
        return [job["id"] for job in jobs]

    assert listed(created_after=created)[-1] == finished
    assert finished not in listed(created_before=created)
    answer = alice.get("/jobs", params={"created_after": "2026-11-21T09:00"})
    assert answer.status_code == 422
    assert "created_after" in problem(answer)["detail"]


@pytest.mark.slow
def test_events_follow_a_job_to_its_end(alice, office, rows):
    file = upload(alice, rows[:3]).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    stream = events(alice, job["id"])
    assert next(stream)["state"] == "validating"
    worker = threading.Thread(target=office.work)
    worker.start()
    states = [told["state"] for told in stream]
    worker.join()
    assert states[-1] == "completed"
    assert alice.get(f"/jobs/{job['id']}").json()["progress"]["rows_done"] == 3


def test_an_input_on_the_service_s_side_is_named_by_its_path_below_the_prefix(
    serve, valkey, problem, rows, tmp_path
):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(
        redis_url=valkey.url, store_url=str(tmp_path / "store"), input_prefix=str(shelf)
    ) as service:
        answer = service.http.post("/jobs", json={"input": "rows.jsonl"})
        assert answer.status_code == 201
        assert (answer.json()["file_id"], answer.json()["input"]) == (None, "rows.jsonl")
        for name in ("../store/check", "/etc/passwd", "http://127.0.0.1/x.jsonl", "file://x.jsonl"):
            answer = service.http.post("/jobs", json={"input": name})
            assert answer.status_code == 403
            assert str(tmp_path) not in problem(answer)["detail"]
        assert service.http.post("/jobs", json={"input": "none.jsonl"}).status_code == 404
        assert service.http.post("/jobs", json={"input": "rows.csv"}).status_code == 422
        (shelf / "2026").mkdir()
        assert service.http.post("/jobs", json={"prefix": "2026"}).status_code == 404
        assert service.http.post("/jobs", json={"prefix": "../store"}).status_code == 403
        (shelf / "2026" / "rows.jsonl").write_text("{}")
        assert service.http.post("/jobs", json={"prefix": "2026"}).json()["prefix"] == "2026"


@pytest.mark.parametrize("body", [{}, {"file_id": "x", "input": "y.jsonl"}])
def test_a_job_has_one_input(alice, problem, body):
    answer = alice.post("/jobs", json=body)
    assert answer.status_code == 422
    assert "either file_id, the id of an upload, or input" in problem(answer)["detail"]


def test_without_a_prefix_no_input_is_read_on_the_service_s_side(alice, problem):
    answer = alice.post("/jobs", json={"input": "rows.jsonl"})
    assert answer.status_code == 403
    assert "--input-prefix" in problem(answer)["detail"]


def test_a_service_without_a_queue_says_so(service, problem):
    for path in ("/jobs", "/jobs/x", "/files/x"):
        answer = service.http.get(path)
        assert answer.status_code == 503
        assert "--redis-url" in problem(answer)["detail"]


def test_a_wrong_password_of_the_queue_is_said_by_readiness_and_by_jobs(
    serve, valkey, problem, tmp_path
):
    wrong = valkey.url.replace(urlsplit(valkey.url).password, "wrong")
    with serve(redis_url=wrong, store_url=str(tmp_path), wait=False) as service:
        for path in ("/health/ready?for=jobs", "/jobs"):
            while "loading" in (answer := service.http.get(path)).text:
                pass
            assert answer.status_code == 503
            assert "password of --redis-url" in problem(answer)["detail"]
            assert "wrong" not in answer.text.replace("WRONGPASS", "")
        # What needs no job is answered all the same.
        assert service.http.get("/health/ready").status_code == 200


def test_readiness_for_jobs_wants_a_worker_that_looks_after_them(furnish, problem, tmp_path):
    with furnish(tmp_path) as house:
        http = house.service.http
        answer = http.get("/health/ready?for=jobs")
        assert answer.status_code == 503
        assert "no worker has been running" in problem(answer)["detail"]
        assert http.get("/health/ready").status_code == 200
        house.reconcile()
        assert http.get("/health/ready?for=jobs").status_code == 200


@pytest.mark.slow
def test_probes_are_answered_while_the_stores_hang(serve, triplet, tmp_path, monkeypatch):
    monkeypatch.setattr("cwpo_service.state._REDIS_SECONDS", TIMEOUT)
    listener = socket.create_server(("127.0.0.1", 0))  # Which takes connections and says nothing.
    silent = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    with listener, serve(redis_url=silent, store_url=str(tmp_path)) as service:
        with ThreadPoolExecutor(100) as pool:
            hanging = [pool.submit(service.http.get, "/health/ready?for=jobs") for _ in range(60)]
            assert service.http.get("/health/ready").status_code == 200
            assert service.annotate(triplet()).status_code == 200
            assert not any(answer.done() for answer in hanging)
            listener.close()  # With it end the connections that it has taken.
        assert {answer.result().status_code for answer in hanging} == {503}


@pytest.mark.slow
def test_a_job_whose_record_cannot_be_read_costs_no_other(furnish, problem, tmp_path, caplog):
    with furnish(tmp_path) as house:
        good, bad = (house.submit(house.rows(3)) for _ in range(2))
        house.redis.set(f"cwpo:job:{bad}", b'{"id": "no record"}')
        http = house.service.http
        assert [job["id"] for job in http.get("/jobs").json()["jobs"]] == [good]
        answer = http.get(f"/jobs/{bad}")
        assert answer.status_code == 500
        assert f"the record of job {bad} cannot be read" in problem(answer)["detail"]
        house.redis.set(f"cwpo:job:{bad}", b'{"id": "no record"}')
        house.redis.set("cwpo:restored", house.redis.info("server")["run_id"])
        house.reconcile()
        house.work()
        assert http.get(f"/jobs/{good}").json()["state"] == "completed"
        # The copy in the store puts it right, as it does after a loss of Redis.
        house.redis.delete("cwpo:restored")
        house.reconcile()
        # Its plan, which has failed, is tried again in a second.
        house.start_worker()
        assert house.wait(bad).state == "completed"


def test_events_end_when_the_service_stops(serve, valkey, rows, tmp_path):
    with serve(redis_url=valkey.url, store_url=str(tmp_path)) as service:
        file = upload(service.http, rows[:1]).json()
        job = service.http.post("/jobs", json={"file_id": file["id"]}).json()
        told = events(service.http, job["id"])
        next(told)
        service.server.should_exit = True
        assert list(told) == []


def test_no_job_is_certified_while_confidences_have_drifted(serve, valkey, tmp_path, triplet):
    def sure_of_nothing():
        annotator = certified_annotator()
        annotator.confidence_quantiles = [0.0] * 11
        return annotator

    rows = [triplet(n) for n in range(200)]
    stores = {"redis_url": valkey.url, "store_url": str(tmp_path)}
    for limit, status in ((1.0, 201), (0.1, 422)):
        with serve(sure_of_nothing, drift_limit=limit, **stores) as service:
            service.annotate(*rows)
            file = upload(service.http, rows).json()["id"]
            asked = service.http.post("/jobs", json={"file_id": file, "max_error": 0.1})
            assert asked.status_code == status
            void = service.http.get("/model").json()["certificates_void"]
            assert (void is None) == (status == 201)
    assert "do not hold at present: the last 200 confidences" in asked.json()["detail"]


@pytest.mark.slow
def test_a_job_certifies_labels_by_the_certificate_of_its_annotator(furnish, tmp_path, triplet):
    rows = [triplet(n, id=f"r{n}") for n in range(30)]
    with (
        furnish(tmp_path, certified_annotator) as office,
        httpx2.Client(base_url=office.url, timeout=TIMEOUT) as http,
    ):
        hosted = http.get("/model").json()
        file = upload(http, rows).json()["id"]
        refused = http.post("/jobs", json={"file_id": file, "max_error": 0.2})
        assert refused.status_code == 422
        detail = refused.json()["detail"]
        assert "no certificate of max_error 0.2: it has 0.1 (delta 0.05, 40% of labels)" in detail
        job = http.post("/jobs", json={"file_id": file, "max_error": 0.1}).json()
        assert [job["certificate"]] == hosted["certificates"]
        # The certificate is of this annotator alone.
        assert job["model"]["revision"] == hosted["revision"]
        office.work()
        assert http.get(f"/jobs/{job['id']}").json()["state"] == "completed"
        results = office.results(job["id"])
        certified = [row["certified"] for row in results]
        assert certified == [row["confidence"] > 0.6 for row in results]
        assert {*certified} == {True, False}
        other = http.post("/jobs", json={"file_id": file, "max_error": 0.1}).json()["id"]
        http.post(f"/jobs/{other}/cancel")
        anew = http.post(f"/jobs/{other}/resume", params={"repin": True})
        assert anew.status_code == 409
        assert "submit its input anew" in anew.json()["detail"]
