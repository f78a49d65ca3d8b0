import json
import os
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pyarrow.parquet as pq
import pytest

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_worker.valkey import EmbeddedValkey

KEYS = {"alice": "wonderland", "bob": "builder", "admin": "root", "cwpo-worker": "ant"}


@pytest.fixture(scope="module")
def valkey(tmp_path_factory):
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as valkey:
        yield valkey


@pytest.fixture(scope="module")
def office(serve, valkey, tmp_path_factory):
    """A service with a queue and a store, where alice, bob and an admin have keys."""
    folder = tmp_path_factory.mktemp("office")
    keys = folder / "keys"
    lines = [f"{name}:{sha256(key.encode()).hexdigest()}\n" for name, key in KEYS.items()]
    keys.write_text("".join(lines))
    store = str(folder / "store")
    with serve(
        redis_url=valkey.url, store_url=store, api_keys_file=keys, max_file_bytes=1 << 20
    ) as service:
        service.environment = {
            "CWPO_URL": service.url,
            "CWPO_REDIS_URL": valkey.url,
            "CWPO_STORE_URL": store,
            "CWPO_API_KEY": KEYS["cwpo-worker"],
        }
        yield service


def work(office):
    """Let a worker do all that is queued."""
    subprocess.run(
        [sys.executable, "-m", "cwpo", "worker", "--burst"],
        env={**os.environ, **office.environment},
        check=True,
    )


@pytest.fixture
def people(office):
    """A connection for each key."""
    clients = {
        name: httpx.Client(base_url=office.url, headers={"X-API-Key": key}, timeout=30)
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
    with httpx.Client(base_url=office.url, headers={"X-API-Key": KEYS["alice"]}) as http:
        file = upload(http, rows).json()
        job = http.post("/jobs", json={"file_id": file["id"]}).json()
        assert job["state"] == "validating"
        work(office)
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
    store = office.environment["CWPO_STORE_URL"]
    left = [name for _, _, names in os.walk(store) for name in names if "partial" in name]
    assert left == []


def digest_of(data):
    return f"sha-256=:{b64encode(sha256(data).digest()).decode()}:"


def stored(office):
    """Every file in the store, half-written ones too."""
    folder = Path(office.environment["CWPO_STORE_URL"])
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
        f"POST /files HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEYS['alice']}\r\n{length}\r\n"
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


def test_a_file_is_deleted_once_no_job_needs_it(alice, people, office, rows, problem):
    file = upload(alice, rows[:3]).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    answer = alice.delete(f"/files/{file['id']}")
    assert answer.status_code == 409
    assert job["id"] in problem(answer)["detail"]
    work(office)
    assert people["bob"].delete(f"/files/{file['id']}").status_code == 404
    assert alice.delete(f"/files/{file['id']}").json() == file
    assert alice.get(f"/files/{file['id']}").status_code == 404
    assert alice.delete(f"/files/{file['id']}").status_code == 404
    assert alice.post("/jobs", json={"file_id": file["id"]}).status_code == 404
    assert alice.get(f"/jobs/{job['id']}/results").status_code == 200


def test_an_ended_job_is_deleted_with_its_results(alice, people, office, rows, problem):
    file = upload(alice, rows[:3]).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    path = f"/jobs/{job['id']}"
    answer = alice.delete(path)
    assert answer.status_code == 409
    assert "validating" in problem(answer)["detail"]
    work(office)
    assert people["bob"].delete(path).status_code == 404
    assert alice.delete(path).json()["state"] == "completed"
    for gone in (path, f"{path}/results", f"{path}/errors", f"{path}/events"):
        assert alice.get(gone).status_code == 404
    assert alice.delete(path).status_code == 404
    assert alice.post(f"{path}/resume").status_code == 404
    assert job["id"] not in [other["id"] for other in alice.get("/jobs").json()["jobs"]]
    assert alice.get(f"/files/{file['id']}").json() == file
    work(office)
    assert not os.path.exists(f"{office.environment['CWPO_STORE_URL']}{path}")


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
    for path in (f"/files/{file}", f"/jobs/{finished}", f"/jobs/{finished}/results"):
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
    with http.stream("GET", f"/jobs/{job_id}/events", timeout=60) as answer:
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


def test_no_event_is_told_twice_and_each_is_of_a_later_step(alice, office, rows):
    file = upload(alice, rows[:3]).json()
    url = f"/jobs/{alice.post('/jobs', json={'file_id': file['id']}).json()['id']}/events"
    with alice.stream("GET", url) as answer:
        first = next(answer.iter_lines()).removeprefix("id: ")
    work(office)
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


def test_events_follow_a_job_to_its_end(alice, office, rows):
    file = upload(alice, rows[:3]).json()
    job = alice.post("/jobs", json={"file_id": file["id"]}).json()
    stream = events(alice, job["id"])
    assert next(stream)["state"] == "validating"
    worker = threading.Thread(target=work, args=[office])
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


@pytest.mark.parametrize("body", [{}, {"file_id": "x", "input": "y.jsonl"}])
def test_a_job_has_one_input(alice, problem, body):
    answer = alice.post("/jobs", json=body)
    assert answer.status_code == 422
    assert "file_id of an upload, or input" in problem(answer)["detail"]


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
        for path in ("/health/ready", "/jobs"):
            while "loading" in (answer := service.http.get(path)).text:
                pass
            assert answer.status_code == 503
            assert "password of --redis-url" in problem(answer)["detail"]
            assert "wrong" not in answer.text.replace("WRONGPASS", "")


def test_events_end_when_the_service_stops(serve, valkey, rows, tmp_path):
    with serve(redis_url=valkey.url, store_url=str(tmp_path)) as service:
        file = upload(service.http, rows[:1]).json()
        job = service.http.post("/jobs", json={"file_id": file["id"]}).json()
        told = events(service.http, job["id"])
        next(told)
        service.server.should_exit = True
        assert list(told) == []
