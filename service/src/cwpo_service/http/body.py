"""Reads JSON bodies, after admission, and validates them in one pass over their bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from cwpo import json_values
from cwpo.types import AnnotateRequest, RankRequest, ScoreRequest
from cwpo_service.http import fast_json
from cwpo_service.problems import ProblemError
from cwpo_service.scoring.admission import Admission, Reservation

M = TypeVar("M", bound=BaseModel)

_DECODERS: dict[type[BaseModel], Callable[[bytes], Any]] = {
    model: fast_json.decoder(model) for model in (AnnotateRequest, ScoreRequest, RankRequest)
}

# For the documentation.
REVISION: dict[str, Any] = {
    "name": "X-Model-Revision",
    "in": "header",
    "required": False,
    "description": "revision of the annotator that has to answer; a replica that hosts another one "
    "answers 503 with the reason `model_revision`",
    "schema": {"type": "string"},
}

# JSON values per item that a request may have. A triplet has eleven, each turn of a dialogue seven.
_VALUES_PER_ITEM = 256

# Texts that may contain half of a surrogate pair: it fails only the item, not the request.
_TEXTS: dict[str, Any] = {
    "triplets": {"__all__": {"prompt", "response_a", "response_b"}},
    "items": {"__all__": {"prompt", "response", "responses"}},
}


async def read(request: Request, model: type[M], *, max_items: int) -> M:
    """Read the request's body and validate it as `model`.

    Args:
        max_items: maximum number of items in the body, which limits the JSON values in it.
    Returns: an instance of `model`; for models of many rows (AnnotateRequest, ScoreRequest,
        RankRequest), a record with the same fields.
    Raises: ProblemError, 415 if the Content-Type is not application/json, so that a web page
        cannot post a form to a service on its reader's machine, and 413 for too many JSON values;
        RequestValidationError for a body that is not valid for the model.
    """
    content_type = request.headers.get("content-type", "none")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ProblemError(
            415, f"send Content-Type: application/json, not {content_type}", reason="invalid"
        )
    body = await request.body()
    limit = max_items * _VALUES_PER_ITEM
    if json_values.exceeds(body, limit):
        raise ProblemError(
            413,
            f"the body has more than {limit:,} JSON values: a request may have at most "
            f"{max_items:,} items",
            reason="too_large",
        )
    if model in _DECODERS:
        with suppress(*fast_json.REFUSALS):
            record: M = _DECODERS[model](body)
            return record
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if b"\\u" in body and (found := _with_half_pairs(model, body)) is not None:
            return found
        # Without the input, which would end up in logs.
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError(errors) from None


def json_body(model: type[M], *, max_items: int = 1) -> Callable[[Request], Awaitable[M]]:
    """A FastAPI dependency that calls `read`, and raises what it raises."""

    async def body(request: Request) -> M:
        return await read(request, model, max_items=max_items)

    return body


@asynccontextmanager
async def admitted(request: Request, admission: Admission) -> AsyncIterator[Reservation]:
    """Check admission by the headers, read the body, and reserve queue space for it.

    Space is reserved after the body is read, because only then is the length of a compressed or
    chunked body known, and so that a client that never sends its body reserves none.
    Raises: ProblemError, 429 if too many tokens are waiting, 503 if the service accepts nothing or
        hosts another revision than the request is pinned to.
    """
    revision = request.headers.get("x-model-revision")
    length = request.headers.get("content-length", "")
    admission.check(int(length) if length.isdecimal() else 0, revision)
    with admission.reserve(len(await request.body()), revision) as reservation:
        request.state.timings = reservation.timings
        yield reservation


def _with_half_pairs(model: type[M], body: bytes) -> M | None:
    """The body, read by a parser that accepts halves of surrogate pairs; None if it is invalid."""
    try:
        found = model.model_validate(json.loads(body))
        found.model_dump_json(exclude=_TEXTS)
    except (ValueError, RecursionError):
        return None
    return found
