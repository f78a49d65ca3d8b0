import gzip
import json
import socket
import threading
from http.client import HTTPResponse

import pytest

from cwpo_annotator.backends.null import NullBackend, NullEncoder
from harness import TIMEOUT


def test_too_many_triplets_are_a_413_that_names_the_limit(serve, triplet, problem):
    with serve(max_triplets=3) as service:
        assert service.annotate(*[triplet(n) for n in range(3)]).status_code == 200
        answer = service.annotate(*[triplet(n) for n in range(4)])
        assert answer.status_code == 413
        assert "at most 3" in problem(answer)["detail"]
        answer = service.http.post("/score", json={"items": [{"prompt": "", "response": "x"}] * 4})
        assert answer.status_code == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/annotate", b'{"triplets":[' + b"{}," * 1_000_000 + b"{}]}"),
        ("/annotate", b'{"triplets":[{"prompt":[' + b"{}," * 1_000_000 + b"{}]}]}"),
        ("/annotate", b'{"x":[' + b"1," * 1_000_000 + b'1],"y":"\\ud83d"}'),
        ("/score", b'{"items":' + b"[" * 1_000_000),
        ("/get_reward", b'{"query":[' + b'"",' * 1_000_000 + b'""]}'),
        ("/jobs", b'{"file_id":[' + b"0," * 1_000_000 + b"0]}"),
        ("/model", b'{"golden":[' + b"{}," * 1_000_000 + b"{}]}"),
    ],
    ids=lambda value: value[:16],
)
def test_more_json_values_than_a_request_is_made_of_are_a_413(service, problem, path, body):
    answer = gzipped(service, gzip.compress(body), path)
    assert answer.status_code == 413
    assert "JSON values" in problem(answer)["detail"]


def test_the_mistakes_of_the_first_wrong_item_are_told(service, triplet, problem):
    answer = service.annotate(triplet(), *({"prompt": "p"} for _ in range(1000)))
    assert answer.status_code == 422
    places = [mistake["place"] for mistake in problem(answer)["errors"]]
    assert places == ["triplets[1].response_a", "triplets[1].response_b"]


def test_dialogues_of_many_turns_are_no_more_than_a_request_is_made_of(service, triplet):
    turns = [{"role": "user", "content": 'well, {"a": [1, 2]}'}] * 60
    answer = service.annotate(*(triplet(n, prompt=turns) for n in range(256)))
    assert answer.status_code == 200


def test_too_long_a_body_is_a_413_that_names_the_limit(serve, triplet, problem):
    with serve(max_body_bytes=1000) as service:
        assert service.annotate(triplet()).status_code == 200
        answer = service.annotate(triplet(prompt="x" * 5_000_000))
        assert answer.status_code == 413
        assert "1,000 bytes" in problem(answer)["detail"]


def test_a_client_that_writes_all_before_it_reads_still_gets_its_answer(serve):
    with serve(max_body_bytes=1000) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(
                b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 30000000\r\n\r\n"
            )
            connection.sendall(b"x" * 30_000_000)
            answer = HTTPResponse(connection)
            answer.begin()
            assert answer.status == 413
            assert b"1,000 bytes" in answer.read()


def test_a_chunked_body_is_refused_while_it_still_comes(serve):
    with serve(max_body_bytes=1000) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(
                b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n"
            )
            # The body has not ended, and never will: the answer cannot wait for it.
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_within_the_limit_is_read(service, triplet):
    body = json.dumps({"triplets": [triplet()]}).encode()
    pieces = (body[at : at + 10] for at in range(0, len(body), 10))
    headers = {"Content-Type": "application/json"}
    assert service.http.post("/annotate", content=pieces, headers=headers).status_code == 200


@pytest.fixture
def asking(triplet):
    """Send requests from threads, and collect their answers when they come."""
    threads, answers = [], []

    def ask(service, count=1, **fields):
        def post():
            answers.append(service.annotate(*[triplet(n) for n in range(count)], **fields))

        threads.append(threading.Thread(target=post))
        threads[-1].start()

    def wait():
        for thread in threads:
            thread.join(TIMEOUT)
        return answers

    ask.wait = wait
    return ask


def queued(service, tokens):
    """Wait until so many tokens are queued."""
    while f"cwpo_queue_tokens {tokens:.1f}" not in service.http.get("/metrics").text:
        pass


def test_a_full_queue_is_a_429_that_says_when_to_come_back(
    serve, annotator_with, gated, asking, triplet, problem
):
    with serve(lambda: annotator_with(gated), queue_tokens=11) as service:
        asking(service, 1)
        assert gated.entered.acquire(timeout=TIMEOUT)
        asking(service, 4)
        queued(service, 8)
        answer = service.annotate(triplet(0), triplet(1))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert "8 tokens are waiting" in problem(answer)["detail"]
        # One that fits still comes in.
        asking(service, 1)
        queued(service, 10)
        gated.gate.set()
        assert [answer.status_code for answer in asking.wait()] == [200] * 3
        assert 'cwpo_failures_total{reason="overloaded"} 1.0' in service.http.get("/metrics").text


def test_a_full_queue_refuses_before_it_has_read_the_body(
    serve, annotator_with, gated, asking, triplet
):
    with serve(lambda: annotator_with(gated), queue_tokens=2) as service:
        asking(service, 1)
        assert gated.entered.acquire(timeout=TIMEOUT)
        asking(service, 1)
        queued(service, 2)
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(
                b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n"
            )
            # The body never comes.
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 429 ")
        # Nor need it be JSON.
        answer = service.http.post(
            "/annotate", content=b"{", headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 429
        gated.gate.set()
        assert [answer.status_code for answer in asking.wait()] == [200] * 2


def test_a_body_that_does_not_come_keeps_no_room(serve, triplet):
    with serve(queue_tokens=10) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(
                b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000000\r\n\r\n"
            )
            assert service.annotate(triplet()).status_code == 200
            assert "cwpo_queue_tokens 0.0" in service.http.get("/metrics").text


class BusyTokeniser(NullEncoder):
    """Tokenises only while its gate is open."""

    def __init__(self):
        self.gate = threading.Event()

    def encode_pairs(self, triplets, truncation):
        assert self.gate.wait(TIMEOUT)
        return super().encode_pairs(triplets, truncation)


def test_requests_that_are_not_tokenised_yet_are_bounded_too(
    serve, annotator_with, asking, triplet, problem
):
    encoder = BusyTokeniser()
    with serve(lambda: annotator_with(NullBackend(), encoder), queue_tokens=100) as service:
        asking(service, 3)
        while "cwpo_queue_tokens 0.0" in service.http.get("/metrics").text:
            pass
        answer = service.annotate(*[triplet(n) for n in range(3)])
        assert answer.status_code == 429
        assert "tokens are waiting" in problem(answer)["detail"]
        encoder.gate.set()
        assert [answer.status_code for answer in asking.wait()] == [200]
        queued(service, 0)


def test_an_idle_service_takes_a_request_larger_than_its_queue(serve, triplet):
    with serve(queue_tokens=10) as service:
        assert service.annotate(*[triplet(n) for n in range(50)]).status_code == 200


def test_a_client_that_goes_away_leaves_the_queue(serve, annotator_with, gated, asking, triplet):
    with serve(lambda: annotator_with(gated), queue_tokens=10) as service:
        asking(service, 1)
        assert gated.entered.acquire(timeout=TIMEOUT)
        host, port = service.url.removeprefix("http://").split(":")
        body = json.dumps({"triplets": [triplet(n) for n in range(5)]}).encode()
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(
                b"POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            queued(service, 10)
        queued(service, 0)
        gated.gate.set()
        assert [answer.status_code for answer in asking.wait()] == [200]
        assert gated.batches == [1]
        assert 'cwpo_failures_total{reason="client_gone"} 1.0' in service.http.get("/metrics").text


def gzipped(service, body, path="/annotate", encoding="gzip", kind="application/json"):
    headers = {"Content-Type": kind, "Content-Encoding": encoding}
    return service.http.post(path, content=body, headers=headers)


def test_a_compressed_body_is_answered_as_the_plain_one_is(service, triplet):
    body = {"triplets": [triplet(n) for n in range(500)]}
    answer = gzipped(service, gzip.compress(json.dumps(body).encode()))
    assert answer.status_code == 200
    assert answer.json() == service.annotate(*body["triplets"]).json()


def test_a_compressed_body_is_counted_after_inflation(serve, triplet, problem):
    with serve(max_body_bytes=10_000) as service:
        for size in (10_001, 50_000_000):
            answer = gzipped(service, gzip.compress(b" " * size))
            assert answer.status_code == 413
            assert "10,000 bytes" in problem(answer)["detail"]
        body = json.dumps({"triplets": [triplet()]}).encode()
        assert gzipped(service, gzip.compress(body.ljust(10_000))).status_code == 200


def test_a_body_that_inflates_in_many_pieces_is_whole(service, triplet):
    triplets = [triplet(n, prompt=f"{n} " * 4000) for n in range(700)]
    body = json.dumps({"triplets": triplets}).encode()
    assert len(body) > 10 << 20
    packed = gzip.compress(body)
    pieces = (packed[at : at + 1000] for at in range(0, len(packed), 1000))
    for sent in (packed, pieces):
        answer = gzipped(service, sent)
        assert answer.status_code == 200
        assert len(answer.json()["annotations"]) == 700


@pytest.mark.parametrize(
    "body", [b"", b"{}", gzip.compress(b"{}", mtime=0)[:-4], gzip.compress(b"{}", mtime=0) + b"x"]
)
def test_a_body_that_is_no_gzip_is_a_400(service, problem, body):
    answer = gzipped(service, body)
    assert answer.status_code == 400
    assert "gzip" in problem(answer)["detail"]


def test_an_unknown_encoding_is_a_415_that_names_the_known_one(service, problem):
    answer = gzipped(service, b"{}", encoding="br")
    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "gzip"
    assert "gzip" in problem(answer)["detail"]


def test_a_request_past_its_deadline_is_a_504_and_leaves_the_queue(
    serve, annotator_with, gated, asking, triplet, problem
):
    with serve(lambda: annotator_with(gated)) as service:
        asking(service, 1)
        assert gated.entered.acquire(timeout=TIMEOUT)
        body = {"triplets": [triplet(n) for n in range(5)]}
        answer = service.http.post("/annotate", json=body, headers={"X-Request-Timeout": "0.05"})
        assert answer.status_code == 504
        assert "X-Request-Timeout" in problem(answer)["detail"]
        queued(service, 0)
        gated.gate.set()
        assert [answer.status_code for answer in asking.wait()] == [200]
        assert gated.batches == [1]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "1e9"])
def test_a_deadline_that_is_none_is_a_422(service, triplet, problem, value):
    answer = service.http.post(
        "/annotate", json={"triplets": [triplet()]}, headers={"X-Request-Timeout": value}
    )
    assert answer.status_code == 422
    assert "x-request-timeout" in problem(answer)["detail"]


def test_a_stuck_forward_pass_is_seen_by_liveness(serve, annotator_with, gated, asking, problem):
    with serve(lambda: annotator_with(gated), stuck_seconds=0.05) as service:
        assert service.http.get("/health/live").status_code == 200
        asking(service, 1)
        assert gated.entered.acquire(timeout=TIMEOUT)
        while (answer := service.http.get("/health/live")).status_code == 200:
            pass
        assert answer.status_code == 503
        assert "stuck" in problem(answer)["detail"]
        gated.gate.set()
        asking.wait()
        assert service.http.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("settings", "batches"), [({}, [3, 3, 1]), ({"token_budget": 4}, [2, 2, 2, 1])]
)
def test_a_batch_is_what_keeps_the_backend_busy_if_none_is_set(
    serve, annotator_with, gated, triplet, settings, batches
):
    # The null annotator's texts are a token each.
    gated.batch_tokens = 6
    gated.gate.set()
    with serve(lambda: annotator_with(gated), **settings) as service:
        service.annotate(*(triplet(number) for number in range(7))).raise_for_status()
    assert gated.batches == batches
