"""POST /annotate, /score and /rank and GET /model, which are methods of the client itself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cwpo.batches import ANNOTATE, RANK, SCORE, A, Batches, Exchange, Question, joined, sent_rows
from cwpo.connection import AsyncConnection, Connection
from cwpo.errors import TooLargeError
from cwpo.transport import Call
from cwpo.types import (
    AnnotateResponse,
    ModelInfo,
    Priority,
    RankItem,
    RankResponse,
    ScoreItem,
    ScoreResponse,
    Triplet,
    Truncation,
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
        concurrency: int = 4,
    ) -> AnnotateResponse:
        """Label the triplets, in order.

        A long input is sent in several requests: by prompt, and of no more triplets and bytes than
        the service takes (GET /model). A triplet that is too large for a request is an error, and
        the others are unharmed.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                triplet an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most triplets of a request.
            concurrency: number of requests that are sent at the same time.
        """
        question = Question(ANNOTATE, truncation, priority, revision)
        batches = Batches(question, sent_rows(triplets), batch_size)
        return joined([*self._exchanges(batches, concurrency)])

    def score(
        self,
        items: Sequence[ScoreItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
    ) -> ScoreResponse:
        """Raw scores (logits) of single responses, in order; otherwise as `annotate`.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                item an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most items of a request.
            concurrency: number of requests that are sent at the same time.
        """
        question = Question(SCORE, truncation, priority, revision)
        batches = Batches(question, sent_rows(items), batch_size)
        return joined([*self._exchanges(batches, concurrency)])

    def rank(
        self,
        items: Sequence[RankItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 512,
        concurrency: int = 4,
    ) -> RankResponse:
        """Order the responses of each item, best first; otherwise as `annotate`.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                item an error, "prompt_left" drops the oldest tokens of the prompt,
                the same for all of its responses.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most responses of a request; those of an item are never parted.
            concurrency: number of requests that are sent at the same time.
        """
        question = Question(RANK, truncation, priority, revision)
        batches = Batches(question, sent_rows(items), batch_size)
        return joined([*self._exchanges(batches, concurrency)])

    def model(self) -> ModelInfo:
        """The annotator that the service has loaded, and the limits of the service."""
        return self._connection.send(_model())

    def _exchanges(self, batches: Batches[A], concurrency: int) -> Iterator[Exchange[A]]:
        """Those for all rows, answered, in the order in which they are sent."""
        if not batches.is_long:
            yield from map(self._answered, batches.exchanges(None))
            return
        pending: deque[Future[Exchange[A]]] = deque()
        pool = ThreadPoolExecutor(concurrency)
        try:
            for exchange in batches.exchanges(self.model()):
                if len(pending) == concurrency:
                    yield pending.popleft().result()
                pending.append(pool.submit(self._answered, exchange))
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answered(self, exchange: Exchange[A]) -> Exchange[A]:
        while (call := exchange.call()) is not None:
            try:
                exchange.receive(self._connection.send(call))
            except TooLargeError as refusal:
                exchange.halve(refusal)
        return exchange


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
        """Label the triplets, in order.

        A long input is sent in several requests: by prompt, and of no more triplets and bytes than
        the service takes (GET /model). A triplet that is too large for a request is an error, and
        the others are unharmed.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                triplet an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most triplets of a request.
            concurrency: number of requests that are sent at the same time.
        """
        question = Question(ANNOTATE, truncation, priority, revision)
        batches = await asyncio.to_thread(Batches, question, sent_rows(triplets), batch_size)
        return joined([each async for each in self._exchanges(batches, concurrency)])

    async def score(
        self,
        items: Sequence[ScoreItem],
        *,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
    ) -> ScoreResponse:
        """Raw scores (logits) of single responses, in order; otherwise as `annotate`.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                item an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most items of a request.
            concurrency: number of requests that are sent at the same time.
        """
        question = Question(SCORE, truncation, priority, revision)
        batches = await asyncio.to_thread(Batches, question, sent_rows(items), batch_size)
        return joined([each async for each in self._exchanges(batches, concurrency)])

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
        """Order the responses of each item, best first; otherwise as `annotate`.

        Args:
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                item an error, "prompt_left" drops the oldest tokens of the prompt,
                the same for all of its responses.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most responses of a request; those of an item are never parted.
            concurrency: number of requests that are sent at the same time.
        """
        question = Question(RANK, truncation, priority, revision)
        batches = await asyncio.to_thread(Batches, question, sent_rows(items), batch_size)
        return joined([each async for each in self._exchanges(batches, concurrency)])

    async def model(self) -> ModelInfo:
        """The annotator that the service has loaded, and the limits of the service."""
        return await self._connection.send(_model())

    async def _exchanges(self, batches: Batches[A], concurrency: int) -> AsyncIterator[Exchange[A]]:
        """Those for all rows, answered, in the order in which they are sent."""
        model = await self.model() if batches.is_long else None
        exchanges = batches.exchanges(model)
        pending: deque[asyncio.Task[Exchange[A]]] = deque()
        try:
            # Reading rows may take a while, in which answers come.
            while (exchange := await asyncio.to_thread(next, exchanges, None)) is not None:
                if len(pending) == concurrency:
                    yield await pending.popleft()
                pending.append(asyncio.create_task(self._answered(exchange)))
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()

    async def _answered(self, exchange: Exchange[A]) -> Exchange[A]:
        while (call := exchange.call()) is not None:
            try:
                exchange.receive(await self._connection.send(call))
            except TooLargeError as refusal:
                exchange.halve(refusal)
        return exchange


def _model() -> Call[ModelInfo]:
    return Call("GET", "/model", ModelInfo)
