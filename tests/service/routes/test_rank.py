import json
import threading
from itertools import pairwise

import numpy as np
import pytest

from cwpo import RankItem
from cwpo_annotator import Annotator
from cwpo_annotator.backends.null import NullBackend
from cwpo_annotator.scores import Scores
from harness import TIMEOUT


def item(number=0, count=4, **fields):
    responses = [f"answer {number} of {place}" for place in range(count)]
    return {"prompt": f"question {number}", "responses": responses} | fields


@pytest.fixture
def rank(service):
    """`rank(item, ..., truncation=...)`: the answer of a service with the null annotator."""
    return lambda *items, **body: service.http.post("/rank", json={"items": [*items], **body})


def test_rankings_come_in_input_order_and_agree_with_the_annotator(rank):
    items = [item(n, 2 + n % 5, id=f"row-{n}") for n in range(100)]
    answer = rank(*items).json()
    expected = Annotator.null().rank([RankItem(**each) for each in items])
    assert answer["rankings"] == [each.model_dump(exclude_none=True) for each in expected]
    assert answer["usage"] == {"triplets": 100, "tokens": sum(2 + n % 5 for n in range(100))}
    assert answer["model"] == {"name": "null", "revision": "null"}


def test_neighbours_have_the_scores_and_the_confidence_of_a_triplet(service, rank):
    asked = item(3, 6)
    (ranking,) = rank(asked).json()["rankings"]
    best_first = [asked["responses"][at] for at in ranking["order"]]
    triplets = [
        {"prompt": asked["prompt"], "response_a": better, "response_b": worse}
        for better, worse in pairwise(best_first)
    ]
    labels = service.annotate(*triplets).json()["annotations"]
    assert {label["preferred"] for label in labels} == {"a"}
    assert ranking["confidence"] == [label["confidence"] for label in labels]
    assert [ranking["scores"][at] for at in ranking["order"]] == [
        *(label["score_a"] for label in labels),
        labels[-1]["score_b"],
    ]


def test_a_missing_id_becomes_the_position(rank):
    answer = rank(item(0), item(1, id="mine"), item(2)).json()
    assert [each["id"] for each in answer["rankings"]] == ["0", "mine", "2"]


def test_equal_responses_tie_in_the_order_in_which_they_were_sent(rank):
    asked = item(responses=["x", "y", "x", "y", "x"])
    (ranking,) = rank(asked).json()["rankings"]
    assert ranking["order"] in ([0, 2, 4, 1, 3], [1, 3, 0, 2, 4])
    ends = [at for at, sure in enumerate(ranking["confidence"]) if sure]
    assert ends == [2 if ranking["order"][0] == 0 else 1]
    assert len(set(ranking["scores"])) == 2


def test_a_bad_item_has_an_error_that_names_the_response_and_leaves_the_others_alone(rank):
    first, bad, last = rank(item(0), item(1, responses=["x", " ", "y"]), item(3)).json()["rankings"]
    detail = "responses[1] is empty"
    assert bad == {"id": "1", "error": {"code": "empty_response", "detail": detail}}
    for good in (first, last):
        assert sorted(good["order"]) == [0, 1, 2, 3]


def test_a_request_of_bad_items_only_is_answered(rank):
    answer = rank(item(responses=["", ""])).json()
    assert answer["rankings"][0]["error"]["code"] == "empty_response"
    assert answer["usage"] == {"triplets": 1, "tokens": 0}


@pytest.mark.parametrize(
    ("items", "place"),
    [
        ([], "items"),
        ([item(), item(count=1)], "items[1].responses"),
        ([item(count=65)], "items[0].responses"),
        ([item(responses=["x", 7])], "items[0].responses[1]"),
        ([item(responses="xy")], "items[0].responses"),
        ([item(response="x")], "items[0].response"),
        ([{"responses": ["x", "y"]}], "items[0].prompt"),
    ],
)
def test_an_invalid_body_is_a_422_that_names_the_place(rank, problem, items, place):
    answer = rank(*items)
    assert answer.status_code == 422
    assert place in [each["place"] for each in problem(answer)["errors"]]


def test_responses_are_counted_against_the_limit_and_not_items(serve, problem):
    with serve(max_triplets=4) as service:
        enough = service.http.post("/rank", json={"items": [item(n, 2) for n in range(4)]})
        assert enough.status_code == 200
        for items in ([item(n, 3) for n in range(3)], [item(count=9)]):
            refused = service.http.post("/rank", json={"items": items})
            assert refused.status_code == 413
            assert "9 responses: a request may have at most 8" in problem(refused)["detail"]


class Torn(NullBackend):
    """Batches of two texts, of which the second one's score is not finite."""

    batch_tokens = 2

    def score_texts(self, texts):
        scores = super().score_texts(texts).values
        scores[1:] = np.nan
        return Scores(scores)


def test_a_score_that_is_not_finite_is_an_error_and_no_rank(serve, annotator_with):
    with serve(lambda: annotator_with(Torn())) as service:
        good = item(responses=["x", "x"])
        body = {"items": [good, item(0, 3), good]}
        first, bad, last = service.http.post("/rank", json=body).json()["rankings"]
    assert bad["error"]["code"] == "non_finite_score"
    assert "order" not in bad
    # Equal responses are scored once, so that these have no second one.
    assert first["order"] == last["order"] == [0, 1]


class Sharing(NullBackend):
    """Reads equal texts of a batch once, and four tokens in one batch."""

    batch_tokens = 4
    reads_once = "texts"

    def __init__(self):
        self.batches = []

    def score_texts(self, texts):
        self.batches.append([text.ids[0] for text in texts])
        return super().score_texts(texts)


def test_what_responses_share_is_counted_once_and_answers_keep_the_order(serve, annotator_with):
    backend = Sharing()
    items = [item(0, 3), item(1, 3), item(0, 3), item(0, 4)]
    with serve(lambda: annotator_with(backend)) as service:
        answer = service.http.post("/rank", json={"items": items}).json()
    expected = Annotator.null().rank([RankItem(**each) for each in items])
    assert answer["rankings"] == [each.model_dump(exclude_none=True) for each in expected]
    assert answer["usage"]["tokens"] == 13
    # Seven texts, of four tokens each batch.
    first, second = backend.batches
    assert (len(set(first)), len(set(second))) == (4, 3)
    assert len(first) + len(second) == 13


def test_calibrated_confidence_stands_beside_where_there_is_a_temperature(serve):
    annotator = Annotator.null()
    annotator.temperature = 2.5
    with serve(lambda: annotator) as service:
        asked = item(1, 3)
        answer = service.http.post("/rank", json={"items": [asked]}).json()
        (ranking,) = answer["rankings"]
        best, middle, _ = (asked["responses"][at] for at in ranking["order"])
        pair = {"prompt": asked["prompt"], "response_a": best, "response_b": middle}
        (label,) = service.annotate(pair).json()["annotations"]
    assert answer["temperature"] == 2.5
    assert ranking["calibrated_confidence"][0] == label["calibrated_confidence"]
    assert ranking["confidence"][0] == label["confidence"]


def test_a_prompt_of_many_responses_waits_as_if_each_two_had_brought_their_own(
    serve, annotator_with, gated, triplet, problem
):
    # Less than 1,000 tokens as it is sent, and many more as it is read.
    long = item(prompt="words " * 330, count=64)
    with serve(lambda: annotator_with(gated), queue_tokens=1000) as service:
        asks = [threading.Thread(target=service.annotate, args=[triplet(n)]) for n in range(2)]
        asks[0].start()
        assert gated.entered.acquire(timeout=TIMEOUT)
        asks[1].start()
        while "cwpo_queue_tokens 2.0" not in service.http.get("/metrics").text.splitlines():
            pass
        refused = service.http.post("/rank", json={"items": [long]})
        gated.gate.set()
        for ask in asks:
            ask.join()
        assert service.http.post("/rank", json={"items": [long]}).status_code == 200
    assert refused.status_code == 429
    assert "at most 1,000 may wait" in problem(refused)["detail"]


def test_rankings_are_counted(serve):
    with serve() as service:
        body = {"items": [item(0), item(1), item(2, responses=["", "x"])]}
        service.http.post("/rank", json=body)
        lines = service.http.get("/metrics").text.splitlines()
    assert "cwpo_rankings_total 2.0" in lines
    assert 'cwpo_failures_total{reason="empty_response"} 1.0' in lines
    assert "cwpo_annotations_total 0.0" in lines
    requests = 'cwpo_requests_total{method="POST",route="/rank",status="200"} 1.0'
    assert requests in lines


def test_concurrent_requests_get_their_own_answers(rank):
    wrong = []

    def ask(start):
        for n in range(start, start + 10):
            items = [item(n * 100 + i, 2 + i) for i in range(n % 5 + 1)]
            got = rank(*items).json()["rankings"]
            want = Annotator.null().rank([RankItem(**each) for each in items])
            if [each["scores"] for each in got] != [each.scores for each in want]:
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=[start * 10]) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_halves_of_surrogate_pairs_fail_only_their_item(service):
    body = json.dumps({"items": [item(0), item(1, responses=["x", "\ud83d"])]})
    headers = {"Content-Type": "application/json"}
    good, bad = service.http.post("/rank", content=body, headers=headers).json()["rankings"]
    assert sorted(good["order"]) == [0, 1, 2, 3]
    assert bad["error"]["code"] == "invalid_text"
    assert "responses[1]" in bad["error"]["detail"]
