from hashlib import sha256

import pytest

from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.checkpoint import CalibrationBin, Card, EncodingSpec, HeldOut
from cwpo_annotator.confidence import drift


@pytest.fixture(scope="module")
def card():
    bins = [CalibrationBin(pairs=5, mean_confidence=0.4, accuracy=0.6)]
    return Card(
        base_model="acme/base",
        objective="bt",
        encoding=EncodingSpec(max_length=64, pad_token="<pad>"),
        labelled_pairs=12,
        held_out=HeldOut(pairs=5, accuracy=0.6, mean_confidence=0.4, ece=0.1, bins=bins),
    )


def test_the_card_is_what_the_checkpoint_records(serve, card):
    null = Annotator.null()

    def factory():
        return Annotator(NullEncoder(), NullBackend(), null.model, card=card)

    with serve(factory) as service:
        told = service.http.get("/model/card").json()
    assert told["base_model"] == "acme/base"
    assert told["labelled_pairs"] == 12
    assert told["held_out"] == card.held_out.model_dump()
    assert told["calibration_pairs"] is None
    assert "encoding" not in told


def test_without_a_card_there_is_the_drift_alone(service):
    told = service.http.get("/model/card").json()
    assert told.pop("drift") == {"distance": None, "annotations": 0, "fewest": 200}
    assert set(told.values()) == {None}


def test_the_drift_is_that_of_the_annotations(serve, triplet):
    quantiles = [at / 10 for at in range(11)]
    null = Annotator.null()

    def factory():
        return Annotator(NullEncoder(), NullBackend(), null.model, confidence_quantiles=quantiles)

    with serve(factory) as service:
        labels = service.annotate(*map(triplet, range(250))).json()["annotations"]
        told = service.http.get("/model/card").json()["drift"]
    assert told["annotations"] == 250
    expected = drift([label["confidence"] for label in labels], quantiles)
    assert told["distance"] == pytest.approx(expected, abs=1e-6)


def test_it_needs_a_key_where_the_service_does(serve, tmp_path, problem):
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{sha256(b'secret').hexdigest()}\n")
    with serve(Annotator.null, api_keys_file=keys) as service:
        assert problem(service.http.get("/model/card"))["status"] == 401
        assert service.http.get("/").status_code == 200
        headers = {"X-API-Key": "secret"}
        assert service.http.get("/model/card", headers=headers).status_code == 200
