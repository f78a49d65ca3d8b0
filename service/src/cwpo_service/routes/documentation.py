"""Parts of a route's OpenAPI documentation: request bodies, example answers and links."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def accepts(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra=` that documents the JSON body of a route."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def takes(*headers: dict[str, Any]) -> dict[str, Any]:
    """The part of a route's `openapi_extra=` about headers that FastAPI does not read for it."""
    return {"parameters": list(headers)}


def answers(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The part of a route's `responses=` with an example of its answer."""
    return {200: {"content": {"application/json": {"example": example}}}}


def leads_to(parameter: str, *operations: str) -> dict[int | str, dict[str, Any]]:
    """The part of a route's `responses=` that links to the operations on the created resource.

    Args:
        parameter: parameter of the operations that takes the id in the answer.
        operations: operation ids.
    """
    links: dict[str, dict[str, Any]] = {
        name: {"operationId": name, "parameters": {parameter: "$response.body#/id"}}
        for name in operations
    }
    return {201: {"links": links}}
