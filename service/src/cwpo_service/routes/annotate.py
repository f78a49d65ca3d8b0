"""POST /annotate, POST /score, POST /rank and POST /embed."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from cwpo.types import (
    AnnotateRequest,
    AnnotateResponse,
    EmbedResponse,
    RankRequest,
    RankResponse,
    ScoreRequest,
    ScoreResponse,
)
from cwpo_service.http import fast_json
from cwpo_service.http.body import REVISION, admitted, read
from cwpo_service.http.deadline import DEADLINE, Deadline, while_awaited
from cwpo_service.problems import documented
from cwpo_service.routes.dependencies import CurrentService, scoped
from cwpo_service.routes.documentation import accepts, answers, takes

router = APIRouter(
    tags=["annotate"],
    dependencies=[scoped("annotate")],
    responses=documented(401, 403, 422, 429, 500),
)

_TRIPLET = {
    "id": "q1",
    "prompt": "How do I keep basil alive?",
    "response_a": "Water it when the soil is dry, and give it light.",
    "response_b": "Basil is a herb.",
}

_MODEL = {"name": "annotator", "revision": "0f7d2c1b9a3e"}
_ANSWER = {
    "annotations": [
        {
            "id": "q1",
            "preferred": "a",
            "confidence": 0.9051,
            "score_a": 2.25,
            "score_b": -0.75,
            "truncated": False,
        }
    ],
    "model": _MODEL,
    "usage": {"triplets": 1, "tokens": 47},
}


@router.post(
    "/annotate",
    summary="Label triplets",
    response_model=AnnotateResponse,
    responses={**documented(400, 413, 415, 429, 503, 504), **answers(_ANSWER)},
    openapi_extra=accepts(AnnotateRequest, {"triplets": [_TRIPLET]}) | takes(DEADLINE, REVISION),
)
async def annotate(
    request: Request,
    service: CurrentService,
    deadline: Deadline,
) -> Response:
    """Say which response of each triplet is preferred, and with what confidence.

    The answer is in input order; a triplet without an id is named by its position. One that
    cannot be annotated has an `error` in place of a label, and the others are unharmed.
    """
    async with admitted(request, service.admission) as reservation:
        body = await read(request, AnnotateRequest, max_items=service.max_triplets)
        work = service.inference.annotate(body, reservation)
        answer = await while_awaited(request, deadline, work)
    return Response(fast_json.encode(answer), media_type="application/json")


@router.post(
    "/score",
    summary="Score single responses",
    response_model=ScoreResponse,
    responses={
        **documented(400, 413, 415, 429, 503, 504),
        **answers(
            {
                "scores": [{"score": 2.25, "truncated": False}],
                "model": _MODEL,
                "usage": {"triplets": 1, "tokens": 25},
            }
        ),
    },
    openapi_extra=accepts(
        ScoreRequest,
        {"items": [{"prompt": _TRIPLET["prompt"], "response": _TRIPLET["response_a"]}]},
    )
    | takes(DEADLINE, REVISION),
)
async def score(
    request: Request,
    service: CurrentService,
    deadline: Deadline,
) -> Response:
    """The annotator's raw score (logit) of each response, in input order."""
    async with admitted(request, service.admission) as reservation:
        body = await read(request, ScoreRequest, max_items=service.max_triplets)
        work = service.inference.score(body, reservation)
        answer = await while_awaited(request, deadline, work)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


@router.post(
    "/rank",
    summary="Rank several responses",
    response_model=RankResponse,
    responses={
        **documented(400, 413, 415, 429, 503, 504),
        **answers(
            {
                "rankings": [
                    {
                        "id": "q1",
                        "order": [2, 0, 1],
                        "scores": [2.25, -0.75, 3.0],
                        "confidence": [0.3584, 0.9051],
                        "truncated": False,
                    }
                ],
                "model": _MODEL,
                "usage": {"triplets": 1, "tokens": 70},
            }
        ),
    },
    openapi_extra=accepts(
        RankRequest,
        {
            "items": [
                {
                    "id": "q1",
                    "prompt": _TRIPLET["prompt"],
                    "responses": [
                        _TRIPLET["response_a"],
                        _TRIPLET["response_b"],
                        "Water it when the soil is dry, and pinch off its flowers.",
                    ],
                }
            ]
        },
    )
    | takes(DEADLINE, REVISION),
)
async def rank(
    request: Request,
    service: CurrentService,
    deadline: Deadline,
) -> Response:
    """Order 2 to 64 responses to each prompt, best first, with the confidence between neighbours.

    The answer is in input order; an item without an id is named by its position. All responses to a
    prompt are compared after the same prompt: if it has to be cut for one, it is cut for all. Equal
    scores keep the order in which the responses were sent, with confidence 0. A request may have
    twice as many responses as it may have triplets.
    """
    async with admitted(request, service.admission) as reservation:
        body = await read(request, RankRequest, max_items=service.max_triplets)
        work = service.inference.rank(body, reservation)
        answer = await while_awaited(request, deadline, work)
    return Response(fast_json.encode(answer), media_type="application/json")


@router.post(
    "/embed",
    summary="Embed triplets",
    response_model=EmbedResponse,
    responses={
        **documented(400, 413, 415, 429, 503, 504),
        **answers(
            {
                "embeddings": [
                    {"id": "q1", "embedding": [0.1283, -0.9047, 0.4471], "truncated": False}
                ],
                "model": _MODEL,
                "usage": {"triplets": 1, "tokens": 47},
            }
        ),
    },
    openapi_extra=accepts(AnnotateRequest, {"triplets": [_TRIPLET]}) | takes(DEADLINE, REVISION),
)
async def embed(
    request: Request,
    service: CurrentService,
    deadline: Deadline,
) -> Response:
    """What the annotator's model makes of each triplet: near ones are alike.

    An embedding is the mean of the last hidden states over the tokens of a text, and then over both
    texts. The answer is in input order; a triplet that cannot be read has an `error` in place of an
    embedding. With the backend vllm there are none, which is a 422.
    """
    async with admitted(request, service.admission) as reservation:
        body = await read(request, AnnotateRequest, max_items=service.max_triplets)
        work = service.inference.embed(body, reservation)
        answer = await while_awaited(request, deadline, work)
    return Response(fast_json.encode(answer), media_type="application/json")
