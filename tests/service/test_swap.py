import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import redis

from cwpo import Client, Triplet
from cwpo.types import ModelRef
from cwpo_annotator import Annotator, CheckpointError
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_worker import planner, shard
from cwpo_worker.ledger import Ledger
from cwpo_worker.store import BlobStore
from cwpo_worker.valkey import EmbeddedValkey


class Opposite(NullBackend):
    """Prefers what the null backend does not; remembers that it was closed."""

    def __init__(self):
        self.closed = threading.Event()

    def score_pairs(self, pairs):
        return -super().score_pairs(pairs)

    def close(self):
        self.closed.set()


def named(name, backend):
    return Annotator(NullEncoder(), backend, ModelRef(name=name, revision="1"))


def swap(service, name, *golden):
    return service.http.post("/model", json={"annotator": name, "golden": list(golden)})


def loading(name):
    return named(name, Opposite() if name.startswith("opposite") else NullBackend())


def test_the_named_annotator_answers_from_then_on(serve, triplet):
    with serve(loader=loading) as service:
        before = service.annotate(triplet()).json()
        answer = swap(service, "opposite")
        assert answer.status_code == 200
        assert answer.json()["name"] == service.http.get("/model").json()["name"] == "opposite"
        after = service.annotate(triplet()).json()
    assert (before["model"]["name"], after["model"]["name"]) == ("null", "opposite")
    assert after["annotations"][0]["score_a"] == -before["annotations"][0]["score_a"]


def test_under_load_no_request_fails_and_no_answer_mixes_models(serve, triplet):
    triplets = [triplet(n) for n in range(200)]
    expected = [a.score_a for a in Annotator.null().annotate([Triplet(**t) for t in triplets])]
    signs = {"straight": 1, "opposite": -1}
    seen, wrong, stop = set(), [], threading.Event()

    def ask(service):
        while not stop.is_set():
            answer = service.annotate(*triplets)
            if answer.status_code != 200:
                wrong.append(answer.text)
                return
            body = answer.json()
            name = body["model"]["name"]
            seen.add(name)
            if [item["score_a"] * signs[name] for item in body["annotations"]] != expected:
                wrong.append(name)

    # A budget far below a request: each is spread over many batches.
    with serve(lambda: loading("straight"), loader=loading, token_budget=64) as service:
        threads = [threading.Thread(target=ask, args=[service]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            for name in ("opposite", "straight"):
                assert swap(service, name).status_code == 200
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert seen == set(signs)


def test_a_request_that_is_under_way_keeps_its_annotator_until_it_is_answered(
    serve, annotator_with, triplet
):
    class Slow(Opposite):
        def __init__(self):
            super().__init__()
            self.gate, self.entered = threading.Event(), threading.Event()

        def score_pairs(self, pairs):
            self.entered.set()
            assert self.gate.wait(30)
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
        assert slow.entered.wait(30)
        swapping = threading.Thread(target=lambda: swapped.append(swap(service, "opposite")))
        swapping.start()
        assert loaded.wait(30)
        slow.gate.set()
        asking.join()
        swapping.join()
        assert slow.closed.wait(30)
    assert answers[0].json()["model"]["name"] == "slow"
    assert swapped[0].status_code == 200


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
        return super().score_pairs(pairs) * float("nan")


class Ordered(NullBackend):
    def score_pairs(self, pairs):
        return super().score_pairs(pairs) + np.array([1.0, 0.0], np.float32)


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
        assert gate.wait(30)
        return loading(name)

    with serve(loader=load) as service:
        swapping = threading.Thread(target=lambda: answers.append(swap(service, "opposite")))
        swapping.start()
        assert entered.wait(30)
        assert service.annotate(triplet()).json()["model"]["name"] == "null"
        second = swap(service, "straight")
        gate.set()
        swapping.join()
    assert second.status_code == 409
    assert "another annotator" in problem(second)["detail"]
    assert answers[0].status_code == 200


def test_a_job_ends_on_the_annotator_that_it_began_with_or_says_why_not(
    serve, triplet, tmp_path, monkeypatch
):
    monkeypatch.setattr("cwpo_worker.ledger.SHARD_ROWS", 2)
    path = tmp_path / "rows.jsonl"
    rows = [triplet(number, id=str(number)) for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = str(tmp_path / "store")

    def of_revision(name):
        annotator = loading(name)
        annotator.model = ModelRef(name="a", revision=name)
        return annotator

    with (
        EmbeddedValkey(tmp_path / "valkey") as valkey,
        serve(
            lambda: of_revision("straight"),
            loader=of_revision,
            redis_url=valkey.url,
            store_url=store,
        ) as service,
        Client(service.url) as client,
    ):

        def work():
            command = [sys.executable, "-m", "cwpo", "worker", "--burst"]
            places = {"URL": service.url, "REDIS_URL": valkey.url, "STORE_URL": store}
            environment = {f"CWPO_{name}": value for name, value in places.items()}
            subprocess.run(command, env={**os.environ, **environment}, check=True)

        job = client.jobs.create(client.files.upload(path).id)
        ledger = Ledger(redis.Redis.from_url(valkey.url), BlobStore(store))
        planner.plan(ledger, job.id)
        shard.annotate(ledger, client, job.id, 0)
        assert swap(service, "opposite").status_code == 200
        work()
        failed = client.jobs.get(job.id)
        assert failed.state == "failed"
        assert "changed its annotator from a straight to a opposite" in failed.error
        assert swap(service, "straight").status_code == 200
        client.jobs.resume(job.id)
        work()
        done = client.jobs.get(job.id)
        assert (done.state, done.model) == ("completed", ModelRef(name="a", revision="straight"))
        result = client.jobs.download(job.id, tmp_path / "out.jsonl", format="jsonl")
    told = [json.loads(line) for line in result.read_text().splitlines()]
    expected = Annotator.null().annotate([Triplet(**row) for row in rows])
    assert [row["confidence"] for row in told] == [label.confidence for label in expected]
    assert [row["preferred"] for row in told] == [label.preferred for label in expected]
