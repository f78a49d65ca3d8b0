"""JSON bodies, validated in one pass over their bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from cwpo_service.problems import ProblemError

M = TypeVar("M", bound=BaseModel)


def json_body(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency that reads the request's body as `model`.

    The dependency raises ProblemError, 415 for another content type: a form that a web page posts
    to a service on the reader's machine has to fail. It raises RequestValidationError for a body
    that is not as the model wants.
    """

    async def read(request: Request) -> M:
        content_type = request.headers.get("content-type", "none")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise ProblemError(
                415, f"send Content-Type: application/json, not {content_type}", reason="invalid"
            )
        try:
            return model.model_validate_json(await request.body())
        except ValidationError as error:
            # The input stays out: it would end up in logs.
            errors = error.errors(include_url=False, include_input=False, include_context=False)
            raise RequestValidationError(errors) from None

    return read


def accepts(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """The `openapi_extra=` of a route that reads its body by json_body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def answers(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The part of a route's `responses=` that shows what its answer is like."""
    return {200: {"content": {"application/json": {"example": example}}}}
