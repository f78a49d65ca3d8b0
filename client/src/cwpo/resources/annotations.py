"""POST /annotate, /score and /rank and GET /model, which are methods of the client itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cwpo.connection import AsyncConnection, Connection
from cwpo.errors import CwpoError
from cwpo.texts import prompt_order
from cwpo.transport import Call
from cwpo.types import (
    AnnotateRequest,
    AnnotateResponse,
    ModelInfo,
    Priority,
    RankItem,
    RankRequest,
    RankResponse,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    Triplet,
    Truncation,
    Usage,
)


class Annotations:
    """Labels and scores from the annotator that the service hosts."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def annotate(
        self,
        triplets: Sequence[Triplet],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
    ) -> AnnotateResponse:
        """Label the triplets, in order; long inputs are sent in several requests, by prompt.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                triplet an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: triplets per request.
        """
        named = _with_ids(triplets)
        order = _order(named, batch_size)
        answers: list[AnnotateResponse] = []
        for at in range(0, len(named), batch_size):
            part = [named[place] for place in order[at : at + batch_size]]
            answer = self._connection.send(_annotate(part, truncation, priority, revision))
            revision = revision or answer.model.revision
            answers.append(answer)
        return _joined(answers, order, revision)

    def score(
        self,
        items: Sequence[ScoreItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
    ) -> ScoreResponse:
        """Raw scores (logits) of single responses, in order, with one request.

        Args: as those of `annotate`.
        """
        return self._connection.send(_score(items, truncation, priority, revision))

    def rank(
        self,
        items: Sequence[RankItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 512,
    ) -> RankResponse:
        """Order the responses of each item, best first; long inputs are sent in several requests.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                item an error, "prompt_left" drops the oldest tokens of the prompt, the same for
                all of its responses.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: responses per request; those of an item are never parted.
        """
        answers: list[RankResponse] = []
        for part in _by_responses(items, batch_size):
            answer = self._connection.send(_rank(part, truncation, priority, revision))
            revision = revision or answer.model.revision
            answers.append(answer)
        return _joined_rankings(answers, revision)

    def model(self) -> ModelInfo:
        """The annotator that the service has loaded, and the limits of the service."""
        return self._connection.send(_model())


class AsyncAnnotations:
    """Labels and scores from the annotator that the service hosts."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def annotate(
        self,
        triplets: Sequence[Triplet],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
    ) -> AnnotateResponse:
        """Label the triplets, in order; long inputs are sent in several requests, by prompt.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                triplet an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: triplets per request.
            concurrency: number of requests sent at the same time.
        """
        named = _with_ids(triplets)
        order = _order(named, batch_size)
        gate = asyncio.Semaphore(concurrency)

        async def part(at: int) -> AnnotateResponse:
            some = [named[place] for place in order[at : at + batch_size]]
            async with gate:
                return await self._connection.send(_annotate(some, truncation, priority, revision))

        first = await part(0)
        revision = revision or first.model.revision
        starts = range(batch_size, len(named), batch_size)
        others = await asyncio.gather(*(part(at) for at in starts))
        return _joined([first, *others], order, revision)

    async def score(
        self,
        items: Sequence[ScoreItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
    ) -> ScoreResponse:
        """Raw scores (logits) of single responses, in order, with one request.

        Args: as those of `annotate`.
        """
        return await self._connection.send(_score(items, truncation, priority, revision))

    async def rank(
        self,
        items: Sequence[RankItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 512,
        concurrency: int = 4,
    ) -> RankResponse:
        """Order the responses of each item, best first; long inputs are sent in several requests.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                item an error, "prompt_left" drops the oldest tokens of the prompt, the same for
                all of its responses.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: responses per request; those of an item are never parted.
            concurrency: number of requests sent at the same time.
        """
        first, *others = _by_responses(items, batch_size)
        gate = asyncio.Semaphore(concurrency)

        async def part(some: Sequence[RankItem]) -> RankResponse:
            async with gate:
                return await self._connection.send(_rank(some, truncation, priority, revision))

        answer = await part(first)
        revision = revision or answer.model.revision
        return _joined_rankings([answer, *await asyncio.gather(*map(part, others))], revision)

    async def model(self) -> ModelInfo:
        """The annotator that the service has loaded, and the limits of the service."""
        return await self._connection.send(_model())


def _annotate(
    triplets: Sequence[Triplet], truncation: Truncation, priority: Priority, revision: str | None
) -> Call[AnnotateResponse]:
    body = AnnotateRequest(triplets=list(triplets), truncation=truncation, priority=priority)
    return Call("POST", "/annotate", AnnotateResponse, body=body, headers=_pinned(revision))


def _pinned(revision: str | None) -> dict[str, str]:
    """The header by which a service that hosts another revision refuses the request."""
    return {} if revision is None else {"X-Model-Revision": revision}


def _with_ids(triplets: Sequence[Triplet]) -> list[Triplet]:
    """The triplets, those without an id named by their position in the whole input.

    Raises: CwpoError for none.
    """
    if not triplets:
        raise CwpoError("there is no triplet to annotate: the list is empty")
    return [
        triplet if triplet.id is not None else triplet.model_copy(update={"id": str(index)})
        for index, triplet in enumerate(triplets)
    ]


def _order(triplets: Sequence[Triplet], batch_size: int) -> Sequence[int]:
    """The order in which triplets are sent: those of one prompt together, if not all are.

    The annotator reads a prompt once for all triplets of a request that have it.
    """
    if len(triplets) <= batch_size:
        return range(len(triplets))
    return prompt_order([triplet.prompt for triplet in triplets])


def _joined(
    answers: Sequence[AnnotateResponse], order: Sequence[int], revision: str | None
) -> AnnotateResponse:
    """One answer out of those to the parts of a long input, which were sent in this order.

    Raises: CwpoError for an answer by another revision, from a service that ignores the header.
    """
    _check_revisions(answers, revision)
    items = [item for answer in answers for item in answer.annotations]
    of_place = dict(zip(order, items, strict=True))
    return AnnotateResponse(
        annotations=[of_place[place] for place in range(len(order))],
        model=answers[0].model,
        usage=_total(answers),
    )


def _check_revisions(
    answers: Sequence[AnnotateResponse] | Sequence[RankResponse], revision: str | None
) -> None:
    """Raises: CwpoError for an answer by another revision than this one."""
    for answer in answers:
        if answer.model.revision != revision:
            raise CwpoError(
                f"the service answered with revision {answer.model.revision} of its annotator, "
                f"where {revision} was asked for: it is of version 0.2 or earlier, or a proxy "
                "removes the header X-Model-Revision"
            )


def _total(answers: Sequence[AnnotateResponse] | Sequence[RankResponse]) -> Usage:
    return Usage(
        triplets=sum(answer.usage.triplets for answer in answers),
        tokens=sum(answer.usage.tokens for answer in answers),
    )


def _score(
    items: Sequence[ScoreItem], truncation: Truncation, priority: Priority, revision: str | None
) -> Call[ScoreResponse]:
    if not items:
        raise CwpoError("there is no item to score: the list is empty")
    body = ScoreRequest(items=list(items), truncation=truncation, priority=priority)
    return Call("POST", "/score", ScoreResponse, body=body, headers=_pinned(revision))


def _rank(
    items: Sequence[RankItem], truncation: Truncation, priority: Priority, revision: str | None
) -> Call[RankResponse]:
    body = RankRequest(items=list(items), truncation=truncation, priority=priority)
    return Call("POST", "/rank", RankResponse, body=body, headers=_pinned(revision))


def _by_responses(items: Sequence[RankItem], batch_size: int) -> list[list[RankItem]]:
    """The items of each request, those without an id named by their position in the whole input.

    Args:
        batch_size: responses per request; an item with more is a request of its own.
    Raises: CwpoError for no item.
    """
    if not items:
        raise CwpoError("there is no item to rank: the list is empty")
    requests: list[list[RankItem]] = []
    room = 0
    for index, item in enumerate(items):
        size = len(item.responses)
        if not requests or size > room:
            requests.append([])
            room = batch_size
        room -= size
        named = item if item.id is not None else item.model_copy(update={"id": str(index)})
        requests[-1].append(named)
    return requests


def _joined_rankings(answers: Sequence[RankResponse], revision: str | None) -> RankResponse:
    """One answer out of those to the parts of a long input. Raises: as _joined does."""
    _check_revisions(answers, revision)
    return RankResponse(
        rankings=[item for answer in answers for item in answer.rankings],
        model=answers[0].model,
        usage=_total(answers),
        temperature=answers[0].temperature,
    )


def _model() -> Call[ModelInfo]:
    return Call("GET", "/model", ModelInfo)
