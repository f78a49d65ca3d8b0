"""POST /get_reward, the interface of OpenRLHF to a remote reward model."""

from __future__ import annotations

from typing import Annotated, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, model_validator

from cwpo.types import FailedScore, ScoreItem, ScoreRequest, Truncation
from cwpo_service.http.body import REVISION, admitted, read
from cwpo_service.http.deadline import DEADLINE, Deadline, while_awaited
from cwpo_service.problems import ProblemError, documented
from cwpo_service.routes.dependencies import CurrentService, scoped
from cwpo_service.routes.documentation import accepts, answers, takes

router = APIRouter(
    tags=["openrlhf"],
    dependencies=[scoped("annotate")],
    responses=documented(401, 403, 422, 429, 500),
)


class RewardRequest(BaseModel):
    """What OpenRLHF sends. Fields that it adds (such as labels) are not needed here."""

    query: Annotated[list[str], Field(min_length=1, fail_fast=True)] = Field(
        description="texts: prompt and response together"
    )
    prompts: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="the prompt of each text"
    )

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if self.prompts is not None and len(self.prompts) != len(self.query):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.query)} texts")
        return self

    def items(self) -> list[ScoreItem]:
        """The texts as items; a text that begins with its prompt is split after the prompt."""
        prompts = self.prompts or [""] * len(self.query)
        return [
            ScoreItem(prompt=prompt, response=text.removeprefix(prompt))
            if text.startswith(prompt)
            else ScoreItem(prompt="", response=text)
            for text, prompt in zip(self.query, prompts, strict=True)
        ]


class RewardResponse(BaseModel):
    """What OpenRLHF reads: a number a text in every list."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


@router.post(
    "/get_reward",
    summary="Reward rollouts",
    response_model=RewardResponse,
    responses={
        **documented(400, 413, 415, 429, 503, 504),
        **answers({"rewards": [1.5], "scores": [1.5], "extra_logs": {"truncated": [0.0]}}),
    },
    openapi_extra=accepts(
        RewardRequest,
        {"query": ["How are you? Well, thank you."], "prompts": ["How are you?"]},
    )
    | takes(DEADLINE, REVISION),
)
async def get_reward(
    request: Request,
    service: CurrentService,
    deadline: Deadline,
    truncation: Annotated[Truncation, Query(description="of too long texts")] = "error",
) -> Response:
    """The raw score of each text, for `--remote_rm_url http://HOST:PORT/get_reward`.

    There is no reward for a text that cannot be scored, so one such text fails the request.
    """
    async with admitted(request, service.admission) as reservation:
        body = await read(request, RewardRequest, max_items=service.max_triplets)
        wanted = ScoreRequest(items=body.items(), truncation=truncation)
        work = service.inference.score(wanted, reservation)
        answer = await while_awaited(request, deadline, work)
    rewards, truncated = [], []
    for index, item in enumerate(answer.scores):
        if isinstance(item, FailedScore):
            raise ProblemError(422, f"query[{index}]: {item.error.detail}", reason=item.error.code)
        rewards.append(item.score)
        truncated.append(float(item.truncated))
    reward = RewardResponse(rewards=rewards, scores=rewards, extra_logs={"truncated": truncated})
    return Response(reward.model_dump_json(), media_type="application/json")
