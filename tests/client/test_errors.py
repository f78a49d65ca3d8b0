"""What is said of data that a model refused."""

import pytest
from pydantic import BaseModel, ValidationError

from cwpo.errors import mistake_in
from cwpo.types import JobRequest, Triplet


def refused(model: type[BaseModel], data: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(data)
    return caught.value


def test_the_mistake_is_named_with_its_place():
    texts = {"response_a": "yes", "response_b": "no"}
    told = mistake_in(refused(Triplet, {"prompt": "why", "response_a": "yes"}))
    assert told == "response_b: Field required"
    # A prompt is text or messages, and these are messages.
    told = mistake_in(refused(Triplet, {"prompt": [{"role": "user"}], **texts}))
    assert told == "prompt[0].content: Field required"


def test_a_mistake_of_the_whole_has_no_place():
    told = mistake_in(refused(JobRequest, {}))
    assert told.startswith("Value error, give either file_id")


def test_the_data_itself_is_not_quoted():
    secret = {"my medical history": 1}
    assert "medical" not in mistake_in(refused(Triplet, {"prompt": secret, "response_a": "x"}))
