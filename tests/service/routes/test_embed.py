"""POST /embed, against transformers, and where an annotator has no embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel

from cwpo import Triplet
from cwpo_annotator import Annotator
from cwpo_annotator.encoded import EncodedPair

TRIPLETS = [
    {"id": f"t{n}", "prompt": f"question {n}", "response_a": "yes " * (n + 1), "response_b": "no"}
    for n in range(9)
]


@pytest.fixture(scope="module")
def embedding(serve, tiny_annotator):
    """A service with a small model, of small batches."""

    def load():
        return Annotator.load(tiny_annotator, dtype="float32")

    with serve(load, token_budget=64) as service:
        yield service


def embeddings(service, triplets):
    answer = service.http.post("/embed", json={"triplets": triplets})
    assert answer.status_code == 200, answer.text
    return answer.json()["embeddings"]


def test_embeddings_are_the_means_of_hidden_states_in_input_order(embedding, tiny_annotator):
    found = embeddings(embedding, TRIPLETS)
    assert [each["id"] for each in found] == [each["id"] for each in TRIPLETS]
    model = AutoModel.from_pretrained(tiny_annotator, dtype=torch.float32)
    annotator = Annotator.load(tiny_annotator, dtype="float32")
    encoded = annotator.encode([Triplet(**each) for each in TRIPLETS])
    for each, pair in zip(found, encoded, strict=True):
        assert isinstance(pair, EncodedPair)
        with torch.no_grad():
            a, b = (
                model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
                for ids in (pair.a, pair.b)
            )
        np.testing.assert_allclose(each["embedding"], (a + b) / 2, atol=1e-4)


def test_one_that_cannot_be_read_leaves_the_others_alone(embedding):
    long = {"prompt": "p", "response_a": "word " * 3000, "response_b": "b"}
    first, bad, empty, last = embeddings(
        embedding, [TRIPLETS[0], long, long | {"response_a": " "}, TRIPLETS[1]]
    )
    assert (bad["error"]["code"], bad["id"]) == ("too_long", "1")
    assert empty["error"]["code"] == "empty_response"
    assert len(first["embedding"]) == len(last["embedding"])


def test_an_annotator_without_hidden_states_has_none(service):
    answer = service.http.post("/embed", json={"triplets": TRIPLETS[:1]})
    assert answer.status_code == 422
    assert "no embeddings of triplets" in answer.json()["detail"]
