"""Records say what their models say, and leave to these what they do not understand."""

import json

import pytest
from pydantic import ValidationError

from cwpo.types import (
    AnnotateRequest,
    ItemError,
    JobRequest,
    RankRequest,
    ScoreRequest,
)
from cwpo_service.http.fast_json import REFUSALS, decoder, encode

ROW = {"prompt": "why", "response_a": "because", "response_b": "wherefore"}
CHAT = [{"role": "user", "content": "why"}]
TEXTS = [
    '"\\u00e9 \\ud83d\\ude00 \\u0000 \\/ \x7f é"',
    '"\\ud83d"',
    '"\\ude00\\ud83d"',
    '"\\x"',
    '"a\tb"',
    '"open',
    "[]",
    '[{"role": "user", "content": "why", "content": "how"}]',
    '[{"role": "robot", "content": "why"}]',
    '[{"role": "user"}]',
    '[{"role": "user", "content": "why", "name": "x"}]',
    '["why"]',
    "7",
    "true",
    "null",
    "NaN",
    '"x", "prompt": "y"',
    '"x", "prompt": 7',
    '"x", "id": null',
    '"x", "id": 7',
    '"x", "id": "mine"',
    '"x", "promt": "y"',
    '"x",',
]
WHOLE = [
    {"triplets": [ROW, {**ROW, "prompt": CHAT}], "truncation": "prompt_left", "priority": "batch"},
    {"triplets": [ROW], "truncation": "cut"},
    {"triplets": [ROW], "priority": None},
    {"triplets": []},
    {"triplets": [ROW, {"prompt": "why"}]},
    {"triplets": {"0": ROW}},
    {"triplets": [list(ROW.values())]},
    [ROW],
    {},
]
BODIES = [
    *(
        b'{"triplets": [{"response_a": "a", "response_b": "b", "prompt": %s}]}' % text.encode()
        for text in TEXTS
    ),
    *(json.dumps(body).encode() for body in WHOLE),
    b'{"triplets": [{"prompt": "\xff", "response_a": "a", "response_b": "b"}]}',
    b'{"triplets": [{"prompt": "\xed\xa0\x80", "response_a": "a", "response_b": "b"}]}',
    b"\xef\xbb\xbf" + json.dumps({"triplets": [ROW]}).encode(),
    json.dumps({"triplets": [ROW]}).encode("utf-16"),
    json.dumps({"triplets": [ROW]}).encode() + b"{}",
    b"[" * 100_000,
    b"",
]


def by_record(model, body):
    try:
        return json.loads(encode(decoder(model)(body)))
    except REFUSALS:
        return None


def by_model(model, body):
    try:
        return json.loads(model.model_validate_json(body).model_dump_json())
    except ValidationError:
        return None


@pytest.mark.parametrize("body", BODIES)
def test_a_record_is_what_the_model_reads_or_there_is_none(body):
    assert by_record(AnnotateRequest, body) in (None, by_model(AnnotateRequest, body))


@pytest.mark.parametrize("count", [0, 1, 2, 64, 65])
def test_a_record_counts_the_values_of_a_list_as_its_model_does(count):
    item = {"prompt": "why", "responses": ["so"] * count}
    body = json.dumps({"items": [item]}).encode()
    assert by_record(RankRequest, body) == by_model(RankRequest, body)
    assert (by_record(RankRequest, body) is None) == (not 2 <= count <= 64)


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (AnnotateRequest, WHOLE[0]),
        (AnnotateRequest, {"triplets": [{**ROW, "id": "é 😀"}]}),
        (ScoreRequest, {"items": [{"prompt": "why", "response": ""}], "priority": "batch"}),
    ],
)
def test_what_is_asked_every_day_is_read_as_a_record(model, body):
    text = json.dumps(body).encode()
    assert by_record(model, text) == by_model(model, text)
    assert by_record(model, text) is not None


def test_there_is_no_record_of_rules_that_only_pydantic_knows():
    with pytest.raises(TypeError):
        decoder(JobRequest)


def test_models_among_the_rows_are_written_too():
    error = ItemError(code="too_long", detail="5 tokens")
    assert json.loads(encode({"rows": [{"id": "é", "error": error}, {"score": -0.1}]})) == {
        "rows": [{"id": "é", "error": error.model_dump()}, {"score": -0.1}]
    }
    with pytest.raises(TypeError):
        encode({"rows": [object()]})
