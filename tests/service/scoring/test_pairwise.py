"""An annotator that compares two responses, behind the service."""

from __future__ import annotations

import pytest

from cwpo_annotator import Annotator
from cwpo_annotator.checkpoint import Card, EncodingSpec, write_card


@pytest.fixture
def pairwise(tiny_annotator, tmp_path):
    for path in tiny_annotator.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    encoding = EncodingSpec(max_length=128, pad_token="<pad>")
    write_card(tmp_path, Card(objective="pairrm", encoding=encoding))
    return tmp_path


def test_pairs_are_labelled_and_single_responses_refused(pairwise, serve, triplet, problem):
    with serve(lambda: Annotator.load(pairwise, dtype="float32", device="cpu")) as service:
        (forth, back) = service.annotate(
            triplet(0), triplet(0, response_a="reply 0", response_b="answer 0")
        ).json()["annotations"]
        assert forth["score_a"] == back["score_b"] != forth["score_b"] == back["score_a"]
        assert forth["confidence"] == back["confidence"] > 0
        scored = service.http.post(
            "/score", json={"items": [{"prompt": "what", "response": "good"}]}
        )
        item = {"prompt": "what", "responses": ["good", "bad"]}
        ranked = service.http.post("/rank", json={"items": [item]})
        rewarded = service.http.post("/get_reward", json={"query": ["what good"]})
        for refused in (scored, ranked, rewarded):
            assert refused.status_code == 422
            assert "compares two responses" in problem(refused)["detail"]
        assert service.annotate(triplet(1)).status_code == 200


def test_it_can_take_the_place_of_another(pairwise, serve):
    def load(path):
        return Annotator.load(path, dtype="float32", device="cpu")

    with serve(loader=load) as service:
        answer = service.http.post("/model", json={"annotator": str(pairwise)})
        assert answer.status_code == 200, answer.text
        assert answer.json()["name"] == pairwise.name
