"""Bad items through the service: an error for each, and the others as without them."""

import json

import numpy as np
import pytest
import torch

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend

HUGE = "cat " * 2_500_000
GOOD = [
    {"prompt": "why cat", "response_a": "because good", "response_b": "no"},
    {"prompt": "thanks", "response_a": "please", "response_b": "sorry " * 20},
]
BAD = {
    "empty_response": {"prompt": "why", "response_a": " ", "response_b": "good"},
    "invalid_text": {"prompt": "why", "response_a": "good", "response_b": "\ud83d"},
    "too_long": {"prompt": HUGE, "response_a": "good", "response_b": "bad"},
}


@pytest.fixture(scope="module")
def real_service(serve, tiny_annotator):
    """A service with a small real model."""
    with serve(lambda: Annotator.load(tiny_annotator, dtype="float32", device="cpu")) as service:
        yield service


def post(service, triplets):
    # Plain ASCII, so that half a surrogate pair gets through to the service.
    body = json.dumps({"triplets": triplets}).encode()
    headers = {"content-type": "application/json"}
    answer = service.http.post("/annotate", content=body, headers=headers)
    assert answer.status_code == 200
    return answer.json()["annotations"]


@pytest.mark.parametrize("code", BAD)
def test_a_bad_item_is_named_and_its_neighbours_are_unharmed(real_service, code):
    first, failed, last = post(real_service, [GOOD[0], BAD[code], GOOD[1]])
    assert failed["error"]["code"] == code
    expected = post(real_service, GOOD)
    for found, alone in zip((first, last), expected, strict=True):
        assert found["score_a"] == pytest.approx(alone["score_a"], abs=1e-5)
        assert found["preferred"] == alone["preferred"]


def test_half_a_surrogate_pair_outside_of_the_texts_is_a_422(service):
    for body in (
        {"triplets": [GOOD[0] | {"id": "\ud83d"}]},
        {"triplets": GOOD, "truncation": "\ud83d"},
    ):
        headers = {"content-type": "application/json"}
        answer = service.http.post("/annotate", content=json.dumps(body), headers=headers)
        assert answer.status_code == 422


def test_half_a_surrogate_pair_in_a_single_text_is_that_items_error(service):
    items = [{"prompt": "why", "response": "good"}, {"prompt": "\ud83d", "response": "good"}]
    headers = {"content-type": "application/json"}
    answer = service.http.post("/score", content=json.dumps({"items": items}), headers=headers)
    assert answer.status_code == 200
    good, bad = answer.json()["scores"]
    assert "score" in good
    assert bad["error"]["code"] == "invalid_text"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_that_items_error(serve, annotator_with, value):
    class Broken(NullBackend):
        def score_pairs(self, pairs):
            scores = super().score_pairs(pairs)
            scores.values[1, 0] = value
            return scores

        def score_texts(self, texts):
            scores = super().score_texts(texts)
            scores.values[1] = value
            return scores

    with serve(lambda: annotator_with(Broken())) as service:
        first, failed, last = post(service, [GOOD[0], GOOD[1], GOOD[0]])
        assert failed["error"]["code"] == "non_finite_score"
        assert first["score_a"] == last["score_a"]
        assert np.isfinite(first["score_b"])
        items = [{"prompt": "why", "response": str(number)} for number in range(3)]
        answer = service.http.post("/score", json={"items": items})
        assert answer.status_code == 200
        scores = answer.json()["scores"]
        assert ["error" in score for score in scores] == [False, True, False]
        metrics = service.http.get("/metrics").text
    assert 'cwpo_failures_total{reason="non_finite_score"} 1.0' in metrics


def test_an_item_that_the_device_cannot_hold_is_that_items_error(serve, tiny_annotator):
    def load():
        annotator = Annotator.load(tiny_annotator, device="cpu")

        def refuse(module, inputs, options):
            if options["input_ids"].numel() > 40:
                raise torch.OutOfMemoryError("on this device")

        annotator.backend.model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
        return annotator

    triplets = [GOOD[0], GOOD[0] | {"prompt": "people " * 40}, GOOD[0]]
    items = [{"prompt": triplet["prompt"], "response": "good"} for triplet in triplets]
    with serve(load) as service:
        annotations = post(service, triplets)
        scores = service.http.post("/score", json={"items": items}).json()["scores"]
    for answers in (annotations, scores):
        codes = [answer.get("error", {}).get("code") for answer in answers]
        assert codes == [None, "out_of_memory", None]
