import json
import socket
import threading
from http.client import HTTPResponse

import numpy as np
import pytest

from cwpo import Triplet
from cwpo.types import ModelRef
from cwpo_annotator import Annotator, CheckpointError
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.scores import Scores
from harness import TIMEOUT


class Opposite(NullBackend):
    """Prefers what the null backend does not; remembers that it was closed."""

    def __init__(self):
        self.closed = threading.Event()

    def score_pairs(self, pairs):
        return Scores(-super().score_pairs(pairs).values)

    def close(self):
        self.closed.set()


def named(name, backend):
    return Annotator(NullEncoder(), backend, ModelRef(name=name, revision="1"))


def swap(service, name, *golden):
    return service.http.post("/model", json={"annotator": name, "golden": list(golden)})


def loading(name):
    return named(name, Opposite() if name.startswith("opposite") else NullBackend())


def of_revision(name):
    """An annotator of the name "a" whose revision says how it prefers."""
    annotator = loading(name)
    annotator.model = ModelRef(name="a", revision=name)
    return annotator


def test_the_named_annotator_answers_from_then_on(serve, triplet):
    with serve(loader=loading) as service:
        before = service.annotate(triplet()).json()
        answer = swap(service, "opposite")
        assert answer.status_code == 200
        assert answer.json()["name"] == service.http.get("/model").json()["name"] == "opposite"
        assert answer.json()["replica"] == socket.gethostname()
        after = service.annotate(triplet()).json()
    assert (before["model"]["name"], after["model"]["name"]) == ("null", "opposite")
    assert after["annotations"][0]["score_a"] == -before["annotations"][0]["score_a"]


def test_under_load_no_request_fails_and_no_answer_mixes_models(serve, triplet):
    triplets = [triplet(n) for n in range(200)]
    expected = [a.score_a for a in Annotator.null().annotate([Triplet(**t) for t in triplets])]
    signs = {"straight": 1, "opposite": -1}
    answered = {name: threading.Semaphore(0) for name in signs}
    wrong, stop = [], threading.Event()

    def ask(service):
        while not stop.is_set():
            answer = service.annotate(*triplets)
            if answer.status_code != 200:
                wrong.append(answer.text)
                return
            body = answer.json()
            name = body["model"]["name"]
            if [item["score_a"] * signs[name] for item in body["annotations"]] != expected:
                wrong.append(name)
            answered[name].release()

    # A budget far below a request: each is spread over many batches.
    with serve(lambda: loading("straight"), loader=loading, token_budget=64) as service:
        threads = [threading.Thread(target=ask, args=[service]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            for name in ("opposite", "straight"):
                assert swap(service, name).status_code == 200
                assert answered[name].acquire(timeout=TIMEOUT)
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_request_that_is_under_way_keeps_its_annotator_until_it_is_answered(
    serve, annotator_with, triplet
):
    class Slow(Opposite):
        def __init__(self):
            super().__init__()
            self.gate, self.entered = threading.Event(), threading.Event()

        def score_pairs(self, pairs):
            self.entered.set()
            assert self.gate.wait(TIMEOUT)
            assert not self.closed.is_set()
            return super().score_pairs(pairs)

    slow, loaded, answers, swapped = Slow(), threading.Event(), [], []

    def load(name):
        loaded.set()
        return loading(name)

    with serve(lambda: named("slow", slow), loader=load, token_budget=2) as service:
        triplets = [triplet(n) for n in range(3)]
        asking = threading.Thread(target=lambda: answers.append(service.annotate(*triplets)))
        asking.start()
        assert slow.entered.wait(TIMEOUT)
        swapping = threading.Thread(target=lambda: swapped.append(swap(service, "opposite")))
        swapping.start()
        assert loaded.wait(TIMEOUT)
        slow.gate.set()
        asking.join()
        swapping.join()
        assert slow.closed.wait(TIMEOUT)
    assert answers[0].json()["model"]["name"] == "slow"
    assert swapped[0].status_code == 200


def pinned_bodies(triplet):
    """A body of each call that scores."""
    texts = triplet()
    item = {"prompt": texts["prompt"], "response": texts["response_a"]}
    return {
        "/annotate": {"triplets": [texts]},
        "/score": {"items": [item]},
        "/rank": {"items": [{"prompt": texts["prompt"], "responses": ["so", "never"]}]},
        "/get_reward": {"query": [item["response"]]},
    }


@pytest.mark.parametrize("path", ["/annotate", "/score", "/rank", "/get_reward"])
def test_pinned_work_is_done_by_its_revision_or_not_at_all(serve, triplet, problem, path):
    body = pinned_bodies(triplet)[path]
    with serve(lambda: of_revision("straight"), loader=of_revision) as service:

        def ask(revision):
            return service.http.post(path, json=body, headers={"X-Model-Revision": revision})

        assert ask("straight").status_code == 200
        assert swap(service, "opposite").status_code == 200
        refused = ask("straight")
        assert refused.status_code == 503
        assert problem(refused)["reason"] == "model_revision"
        assert "hosts annotator a at revision opposite" in problem(refused)["detail"]
        assert "pinned to revision straight" in problem(refused)["detail"]
        assert int(refused.headers["retry-after"]) in (1, 2)
        # A load balancer may choose another replica for the next connection.
        assert refused.headers["connection"] == "close"
        assert ask("opposite").status_code == 200
        failures = service.http.get("/metrics").text
    assert 'cwpo_failures_total{reason="model_revision"} 1.0' in failures


def head_of(body, revision):
    """The head of a request whose body is sent once the service has asked for it."""
    return (
        "POST /annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"X-Model-Revision: {revision}\r\nContent-Length: {len(body)}\r\n"
        "Expect: 100-continue\r\n\r\n"
    ).encode()


def test_the_rows_of_work_that_is_refused_are_not_asked_for(service, triplet):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        connection.sendall(head_of(json.dumps({"triplets": [triplet()]}), "other"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 503 ")


def test_pinned_work_is_refused_if_the_annotator_changes_while_its_body_arrives(serve, triplet):
    body = json.dumps({"triplets": [triplet()]}).encode()
    with serve(lambda: of_revision("straight"), loader=of_revision) as service:
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(head_of(body, "straight"))
            # It is admitted: the service asks for the body.
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
            assert swap(service, "opposite").status_code == 200
            connection.sendall(body)
            answer = HTTPResponse(connection)
            answer.begin()
            assert answer.status == 503
            assert b"model_revision" in answer.read()


def test_an_annotator_answers_under_the_revision_that_earlier_versions_gave_it(serve, triplet):
    def load():
        annotator = Annotator.null()
        annotator.former_revision = "before"
        return annotator

    with serve(load) as service:
        for revision in ("before", "null"):
            headers = {"X-Model-Revision": revision}
            body = {"triplets": [triplet()]}
            answer = service.http.post("/annotate", json=body, headers=headers).json()
            assert answer["model"] == {"name": "null", "revision": revision}


def golden(triplet, number, preferred):
    return {**triplet(number), "preferred": preferred}


def test_an_annotator_that_labels_a_golden_triplet_otherwise_is_not_taken(serve, triplet, problem):
    loaded = []

    def load(name):
        loaded.append(loading(name))
        return loaded[-1]

    right = Annotator.null().annotate([Triplet(**triplet(n)) for n in range(3)])
    items = [golden(triplet, n, label.preferred) for n, label in enumerate(right)]
    with serve(loader=load) as service:
        assert swap(service, "straight", *items).status_code == 200
        answer = swap(service, "opposite", *items)
        assert answer.status_code == 422
        assert problem(answer)["detail"].startswith("golden[0]: opposite prefers ")
        assert service.annotate(triplet()).json()["model"]["name"] == "straight"
    assert loaded[1].backend.closed.is_set()


class NotFinite(NullBackend):
    def score_pairs(self, pairs):
        return Scores(super().score_pairs(pairs).values * float("nan"))


class Ordered(NullBackend):
    def score_pairs(self, pairs):
        return Scores(super().score_pairs(pairs).values + np.array([1.0, 0.0], np.float32))


@pytest.mark.parametrize(
    ("backend", "complaint"), [(NotFinite, "NaN"), (Ordered, "order of the two responses")]
)
def test_an_annotator_that_cannot_be_sane_is_not_taken(serve, problem, backend, complaint):
    with serve(loader=lambda name: named(name, backend())) as service:
        answer = swap(service, "insane")
        assert answer.status_code == 422
        assert complaint in problem(answer)["detail"]
        assert service.http.get("/model").json()["name"] == "null"


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (CheckpointError("x: no such folder"), "x: no such"),
        (MemoryError("CUDA"), "MemoryError: CU"),
    ],
)
def test_an_annotator_that_cannot_be_loaded_leaves_the_present_one(
    serve, triplet, problem, error, complaint
):
    def load(name):
        raise error

    with serve(loader=load) as service:
        answer = swap(service, "x")
        assert answer.status_code == 422
        assert complaint in problem(answer)["detail"]
        assert service.annotate(triplet()).status_code == 200


def test_requests_are_answered_while_another_annotator_loads_and_only_one_does(
    serve, triplet, problem
):
    entered, gate, answers = threading.Event(), threading.Event(), []

    def load(name):
        entered.set()
        assert gate.wait(TIMEOUT)
        return loading(name)

    with serve(loader=load) as service:
        swapping = threading.Thread(target=lambda: answers.append(swap(service, "opposite")))
        swapping.start()
        assert entered.wait(TIMEOUT)
        assert service.annotate(triplet()).json()["model"]["name"] == "null"
        second = swap(service, "straight")
        gate.set()
        swapping.join()
    assert second.status_code == 409
    assert "another annotator" in problem(second)["detail"]
    assert answers[0].status_code == 200


@pytest.mark.slow
def test_a_job_ends_on_the_annotator_that_it_began_with(furnish, triplet, tmp_path, monkeypatch):
    monkeypatch.setattr("cwpo_worker.jobs.ledger.SHARD_ROWS", 2)
    path = tmp_path / "rows.jsonl"
    rows = [triplet(number, id=str(number)) for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    with furnish(tmp_path, lambda: of_revision("straight"), loader=of_revision) as house:
        service, client = house.service, house.client
        job = client.jobs.create(client.files.upload(path).id)
        house.plan(job.id)
        house.annotate(job.id, 0)
        assert swap(service, "opposite").status_code == 200
        house.start_worker()
        house.wait_for(job.id, lambda job: job.waiting is not None)
        assert swap(service, "straight").status_code == 200
        done = client.jobs.wait(job.id)
        assert (done.state, done.model) == ("completed", ModelRef(name="a", revision="straight"))
        result = client.jobs.download(job.id, tmp_path / "out.jsonl", format="jsonl")
    told = [json.loads(line) for line in result.read_text().splitlines()]
    expected = Annotator.null().annotate([Triplet(**row) for row in rows])
    assert [row["confidence"] for row in told] == [label.confidence for label in expected]
    assert [row["preferred"] for row in told] == [label.preferred for label in expected]
