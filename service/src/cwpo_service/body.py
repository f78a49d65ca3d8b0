"""JSON bodies, validated in one pass over their bytes, and only when there is room for them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from cwpo.types import AnnotateRequest, ScoreRequest
from cwpo_service import records
from cwpo_service.admission import Room
from cwpo_service.inference import Inference
from cwpo_service.problems import ProblemError

M = TypeVar("M", bound=BaseModel)

_DECODERS: dict[type[BaseModel], Callable[[bytes], Any]] = {
    model: records.decoder(model) for model in (AnnotateRequest, ScoreRequest)
}

# What may hold half of a surrogate pair: it fails the item, where elsewhere it fails the request.
_TEXTS: dict[str, Any] = {
    "triplets": {"__all__": {"prompt", "response_a", "response_b"}},
    "items": {"__all__": {"prompt", "response"}},
}


async def read(request: Request, model: type[M]) -> M:
    """The request's body as `model`; that of many rows as a record with the model's fields.

    Raises: ProblemError, 415 for another content type: a form that a web page posts to a service
        on the reader's machine has to fail. RequestValidationError for a body that is not as the
        model wants.
    """
    content_type = request.headers.get("content-type", "none")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ProblemError(
            415, f"send Content-Type: application/json, not {content_type}", reason="invalid"
        )
    body = await request.body()
    if model in _DECODERS:
        with suppress(*records.REFUSALS):
            record: M = _DECODERS[model](body)
            return record
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if b"\\u" in body and (found := _with_half_pairs(model, body)) is not None:
            return found
        # The input stays out: it would end up in logs.
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError(errors) from None


def json_body(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency that reads the request's body as `model`; raises what read does."""

    async def body(request: Request) -> M:
        return await read(request, model)

    return body


@asynccontextmanager
async def admitted(request: Request, inference: Inference) -> AsyncIterator[Room]:
    """Room for the request's texts, asked for before its body is read, and again once it is.

    Only then is it known how long a compressed or chunked body is; and who never sends what the
    headers promise keeps no room from others.
    Raises: ProblemError, 429 while too much waits already, 503 while nothing is accepted.
    """
    length = request.headers.get("content-length", "")
    inference.admit(int(length) if length.isdecimal() else 0)
    with inference.room(len(await request.body())) as room:
        request.state.journey = room.journey
        yield room


def _with_half_pairs(model: type[M], body: bytes) -> M | None:
    """The body read by a parser that lets halves of surrogate pairs pass; None if it is no use."""
    try:
        found = model.model_validate(json.loads(body))
        found.model_dump_json(exclude=_TEXTS)
    except (ValueError, RecursionError):
        return None
    return found


def accepts(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra=` of a route that reads its body by json_body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def answers(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The part of a route's `responses=` that shows what its answer is like."""
    return {200: {"content": {"application/json": {"example": example}}}}


def leads_to(parameter: str, *operations: str) -> dict[int | str, dict[str, Any]]:
    """The part of a route's `responses=` that says which calls take the id that it answers."""
    links: dict[str, dict[str, Any]] = {
        name: {"operationId": name, "parameters": {parameter: "$response.body#/id"}}
        for name in operations
    }
    return {201: {"links": links}}
