from pathlib import Path

import pytest

from cwpo_service import openapi

CONTRACT = Path(__file__).parents[2] / "openapi" / "openapi.json"


def test_the_written_contract_is_that_of_the_code():
    assert CONTRACT.read_text() == openapi.render(), "run `make openapi`"


@pytest.fixture(scope="module")
def document(service):
    return service.http.get("/openapi.json").json()


def operations(document):
    for path, calls in document["paths"].items():
        for method, operation in calls.items():
            yield f"{method} {path}", operation


def test_every_call_has_a_summary_a_description_and_a_tag(document):
    known = {tag["name"] for tag in document["tags"]}
    for name, operation in operations(document):
        assert operation["summary"], name
        assert operation["description"], name
        assert set(operation["tags"]) <= known, name


def test_every_error_answer_is_a_problem(document):
    for name, operation in operations(document):
        for status, answer in operation["responses"].items():
            if status >= "400":
                content = answer["content"]["application/problem+json"]
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}, name
                assert content["example"]["status"] == int(status), name
    for name in ("HTTPValidationError", "ValidationError"):
        assert name not in document["components"]["schemas"]


def test_every_reference_leads_somewhere(document):
    def references(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                else:
                    yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(document))
    assert "#/components/schemas/AnnotateRequest" in found
    for reference in found:
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_examples_are_valid_requests(document, service):
    for path in ("/annotate", "/score", "/rank", "/get_reward"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert service.http.post(path, json=body["example"]).status_code == 200


def test_the_documents_are_served(service):
    assert service.http.get("/docs").status_code == 200
