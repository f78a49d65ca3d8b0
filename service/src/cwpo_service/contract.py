"""The REST contract as an OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from cwpo.types import (
    AnnotateRequest,
    JobRequest,
    Problem,
    RankRequest,
    ScoreRequest,
    SwapRequest,
)
from cwpo_service.access.keys import SECURITY_SCHEMES
from cwpo_service.routes.openrlhf import RewardRequest
from cwpo_worker.reviews.review import AnswerRequest, ReviewRequest, TurnRequest

TAGS = [
    {"name": "annotate", "description": "Labels, scores and rankings at once."},
    {"name": "files", "description": "Uploads for batch jobs."},
    {"name": "jobs", "description": "Batch jobs: millions of triplets into a weighted dataset."},
    {"name": "reviews", "description": "People label the uncertain rows of a job's dataset."},
    {"name": "openrlhf", "description": "The annotator as OpenRLHF's remote reward model."},
    {"name": "operate", "description": "Probes and metrics; these need no API key."},
]

# FastAPI cannot see that routes read or write these models, and would leave them out.
_MODELS = (
    AnnotateRequest,
    ScoreRequest,
    RankRequest,
    SwapRequest,
    JobRequest,
    ReviewRequest,
    TurnRequest,
    AnswerRequest,
    RewardRequest,
    Problem,
)


def install(app: FastAPI) -> None:
    """Make /openapi.json, which /docs shows, return this module's document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        summary=app.summary,
        version=app.version,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS],
        ref_template="#/components/schemas/{model}",
    )
    schemas = document["components"]["schemas"]
    for name, schema in definitions["$defs"].items():
        schemas.setdefault(name, schema)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = SECURITY_SCHEMES
    for operations in document["paths"].values():
        for operation in operations.values():
            if "401" in operation["responses"]:
                operation["security"] = [{name: []} for name in SECURITY_SCHEMES]
    return document
