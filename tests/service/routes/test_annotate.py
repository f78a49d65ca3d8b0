import logging
import threading

import numpy as np
import pytest

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.backends.null import NullBackend
from cwpo_annotator.scores import Scores
from harness import TIMEOUT


def test_annotations_come_in_input_order_and_agree_with_the_annotator(service, triplet):
    triplets = [triplet(n, id=f"row-{n}") for n in range(300)]
    answer = service.annotate(*triplets).json()
    expected = Annotator.null().annotate([Triplet(**t) for t in triplets])
    assert answer["annotations"] == [a.model_dump(exclude_none=True) for a in expected]
    assert answer["usage"] == {"triplets": 300, "tokens": 600}
    assert answer["model"] == {"name": "null", "revision": "null"}


def test_a_missing_id_becomes_the_position(service, triplet):
    answer = service.annotate(triplet(0), triplet(1, id="mine"), triplet(2)).json()
    assert [item["id"] for item in answer["annotations"]] == ["0", "mine", "2"]


def test_a_bad_item_has_an_error_and_leaves_the_others_alone(service, triplet):
    answer = service.annotate(triplet(0), triplet(1, response_b=" "), triplet(2)).json()
    first, bad, last = answer["annotations"]
    assert bad == {"id": "1", "error": {"code": "empty_response", "detail": "response_b is empty"}}
    assert {first["preferred"], last["preferred"]} <= {"a", "b"}


def test_a_request_of_bad_items_only_is_answered(service, triplet):
    answer = service.annotate(triplet(response_a=""), triplet(response_b="")).json()
    assert [item["error"]["code"] for item in answer["annotations"]] == ["empty_response"] * 2
    assert answer["usage"]["tokens"] == 0


def test_chat_prompts_are_taken(service, triplet):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    answer = service.annotate(triplet(prompt=chat)).json()
    expected = Annotator.null().annotate([Triplet(**triplet(prompt=chat))])[0]
    assert answer["annotations"][0]["score_a"] == expected.score_a


def test_scores_are_those_of_annotate(service, triplet):
    asked = triplet(7)
    annotation = service.annotate(asked).json()["annotations"][0]
    items = [{"prompt": asked["prompt"], "response": asked[f"response_{which}"]} for which in "ab"]
    answer = service.http.post("/score", json={"items": [*items, {"prompt": "", "response": ""}]})
    a, b, empty = answer.json()["scores"]
    assert (a["score"], b["score"]) == (annotation["score_a"], annotation["score_b"])
    assert empty["error"]["code"] == "empty_response"


def test_concurrent_requests_get_their_own_answers(service, triplet):
    expected = Annotator.null()
    wrong = []

    def ask(start):
        for n in range(start, start + 20):
            triplets = [triplet(n * 100 + i) for i in range(n % 5 + 1)]
            got = service.annotate(*triplets).json()["annotations"]
            want = expected.annotate([Triplet(**t) for t in triplets])
            if [g["score_a"] for g in got] != [w.score_a for w in want]:
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=[start * 20]) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_place_of_each_mistake_is_named(service, triplet, problem):
    body = {"triplets": [triplet(), {"prompt": "p", "response_a": "x", "respons_b": "y"}]}
    answer = service.http.post("/annotate", json=body)
    assert answer.status_code == 422
    told = problem(answer)
    assert told["detail"] == "triplets[1].response_b: Field required (and 1 more)"
    assert [item["place"] for item in told["errors"]] == [
        "triplets[1].response_b",
        "triplets[1].respons_b",
    ]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"triplets": []}, "triplets"),
        ({}, "triplets"),
        ({"triplets": [{"prompt": 3, "response_a": "", "response_b": ""}]}, "triplets[0].prompt"),
        (
            {"triplets": [{"prompt": [{"role": "x"}], "response_a": "", "response_b": ""}]},
            "triplets[0].prompt[0].role",
        ),
        ({"triplets": 1, "truncation": "cut"}, "truncation"),
        ([], "body"),
    ],
)
def test_an_invalid_body_is_a_422_that_names_the_place(service, problem, body, place):
    answer = service.http.post("/annotate", json=body)
    assert answer.status_code == 422
    assert place in [item["place"] for item in problem(answer)["errors"]]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"triplets": [' * 1000, b'"\\ud800"', b"[" * 100_000]
)
def test_what_is_no_json_is_a_422(service, problem, body):
    headers = {"Content-Type": "application/json"}
    answer = service.http.post("/annotate", content=body, headers=headers)
    assert answer.status_code == 422
    assert "JSON" in problem(answer)["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_a_web_page_could_post_is_refused(service, problem, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    answer = service.http.post("/annotate", content=b'{"triplets": []}', headers=headers)
    assert answer.status_code == 415
    assert "application/json" in problem(answer)["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("DELETE", "/annotate", 405), ("DELETE", "/model", 405)],
)
def test_unknown_paths_and_methods_are_problems(service, problem, method, path, status):
    answer = service.http.request(method, path)
    assert answer.status_code == status
    assert path in problem(answer)["detail"]


def test_a_sane_request_id_is_kept_and_any_other_replaced(service):
    for given in ("trace-1.2:3", "x" * 128):
        answer = service.http.get("/model", headers={"X-Request-ID": given})
        assert answer.headers["x-request-id"] == given
    for given in ("", "a b", "x" * 129, "<script>"):
        answer = service.http.get("/model", headers={"X-Request-ID": given})
        assert answer.headers["x-request-id"] not in ("", given)


def test_model_tells_the_limits(serve):
    with serve(max_triplets=7, max_body_bytes=999) as service:
        told = service.http.get("/model").json()
    assert told["name"] == told["backend"] == "null"
    assert (told["max_triplets"], told["max_body_bytes"]) == (7, 999)


class Picky(NullBackend):
    """Fails on batches of more pairs than it likes."""

    def __init__(self, limit):
        self.limit = limit

    def score_pairs(self, pairs):
        if len(pairs) > self.limit:
            raise RuntimeError("SECRET PROMPT in the message")
        return super().score_pairs(pairs)


def test_a_failing_backend_is_a_500_without_its_message(
    serve, annotator_with, triplet, problem, caplog
):
    with serve(lambda: annotator_with(Picky(2))) as service:
        answer = service.annotate(*[triplet(n) for n in range(3)])
        assert answer.status_code == 500
        assert "SECRET" not in answer.text
        assert "Traceback" not in answer.text
        problem(answer)
        # The service goes on.
        assert service.annotate(triplet()).status_code == 200
        assert service.http.get("/health/live").status_code == 200


def test_a_request_that_breaks_its_batch_fails_alone(serve, annotator_with, gated, triplet):
    class Broken(type(gated)):
        def score_pairs(self, pairs):
            scores = super().score_pairs(pairs)
            if len(pairs) > 1:
                raise RuntimeError("out of memory")
            return scores

    backend = Broken()
    statuses = {}
    with serve(lambda: annotator_with(backend)) as service:

        def ask(name, count):
            statuses[name] = service.annotate(*[triplet(n) for n in range(count)]).status_code

        asks = [("first", 1), ("good", 1), ("bad", 2)]
        threads = [threading.Thread(target=ask, args=item) for item in asks]
        threads[0].start()
        assert backend.entered.acquire(timeout=TIMEOUT)
        for thread in threads[1:]:
            thread.start()
        while service.http.get("/metrics").text.count("cwpo_queue_tokens 6.0") == 0:
            pass
        backend.gate.set()
        for thread in threads:
            thread.join()
    assert statuses == {"first": 200, "good": 200, "bad": 500}
    # The two waited together and were scored together before they were scored alone.
    assert backend.batches[:2] == [1, 3]
    # And after the failure something plain, to see that the backend lives.
    assert sorted(backend.batches[2:]) == [1, 1, 2]


class Forgetful(NullBackend):
    def score_pairs(self, pairs):
        return super().score_pairs(pairs[:1])


def test_a_backend_that_loses_scores_fails_the_request(serve, annotator_with, triplet):
    with serve(lambda: annotator_with(Forgetful())) as service:
        assert service.annotate(triplet(0), triplet(1)).status_code == 500
        assert service.http.get("/health/live").status_code == 200


class NotFinite(NullBackend):
    def score_pairs(self, pairs):
        scores = super().score_pairs(pairs)
        scores.values[1, 0] = np.nan
        scores.values[2, 1] = np.inf
        return scores

    def score_texts(self, texts):
        return Scores(np.array([np.nan, np.inf, 1.5], np.float32))


def test_a_score_that_is_not_finite_is_an_error_and_no_label(serve, annotator_with, triplet):
    with serve(lambda: annotator_with(NotFinite())) as service:
        good, *bad = service.annotate(*[triplet(n) for n in range(3)]).json()["annotations"]
        items = [{"prompt": "", "response": "x"}] * 3
        nan, infinite, finite = service.http.post("/score", json={"items": items}).json()["scores"]
    assert "preferred" in good
    for item in (*bad, nan, infinite):
        assert item["error"]["code"] == "non_finite_score"
    assert finite["score"] == 1.5


class Buggy:
    max_length = 10

    def encode_pairs(self, triplets, truncation):
        raise ValueError(f"cannot encode {triplets[0].prompt!r}")


def test_a_bug_is_a_500_whose_log_has_the_stack_but_no_prompt(
    serve, annotator_with, triplet, problem, caplog
):
    with (
        serve(lambda: annotator_with(NullBackend(), Buggy())) as service,
        caplog.at_level(logging.ERROR),
    ):
        answer = service.http.post(
            "/annotate",
            json={"triplets": [triplet(prompt="PRIVATE words")]},
            headers={"X-Request-ID": "find-me"},
        )
    assert answer.status_code == 500
    told = problem(answer)
    assert "find-me" in told["detail"]
    assert "PRIVATE" not in answer.text
    assert "find-me" in caplog.text
    assert "encode_pairs" in caplog.text
    assert "PRIVATE" not in caplog.text
