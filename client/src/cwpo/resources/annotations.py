"""POST /annotate, /score, /rank and /embed, and /model, which are methods of the client itself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError

from cwpo.batches import (
    ANNOTATE,
    EMBED,
    RANK,
    SCORE,
    STREAMED_ROWS,
    A,
    Batches,
    Exchange,
    InOrder,
    Question,
    joined,
    sent_rows,
)
from cwpo.connection import AsyncConnection, Connection
from cwpo.datasets.records import Rows, count
from cwpo.errors import CwpoError, TooLargeError, mistake_in
from cwpo.progress import Progress, shown
from cwpo.transport import Call
from cwpo.types import (
    AnnotateResponse,
    Annotation,
    Embedding,
    EmbedResponse,
    FailedAnnotation,
    FailedScore,
    GoldenTriplet,
    ModelChange,
    ModelInfo,
    Priority,
    Ranking,
    RankResponse,
    Score,
    ScoreResponse,
    SwapRequest,
    Truncation,
)


class Annotations:
    """Labels and scores from the annotator that the service hosts."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def annotate(
        self,
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> AnnotateResponse:
        """Label the triplets, in order; all labels are kept, which `annotate_iter` does not.

        A long input is sent in several requests: by prompt, and of no more triplets and bytes than
        the service takes (GET /model). A triplet that is too large for a request is an error, and
        the others are unharmed.

        Args:
            triplets: Triplet objects or dictionaries (also with TRL's `chosen` and `rejected`), in
                a list, an iterator or a `datasets.Dataset`; or a table of pandas, polars or Arrow.
                A row that is not valid is an error in its place.
            columns: the input's names of columns, by the names that are needed, such as
                {"prompt": "question"}.
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                triplet an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most triplets of a request.
            concurrency: number of requests that are sent at the same time.
            progress: shows how many rows have an answer, on stderr for True.
        Raises: DatasetError for an input that has no rows, none that is valid, or not the columns
            that are needed, which are then named.
        """
        question = Question(ANNOTATE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._all(question, triplets, *how)

    def annotate_iter(
        self,
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> Iterator[Annotation | FailedAnnotation]:
        """Label the triplets of an input of any length, and yield the labels in order.

        It is a method of its own, since `annotate` returns one answer with all labels, and so keeps
        them all: this one reads some thousand rows ahead of the label that it yields, and its
        memory stays the same however many there are. Arguments and errors are those of `annotate`;
        the errors come with the first label that is asked for.
        """
        question = Question(ANNOTATE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, triplets, *how)

    def score(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> ScoreResponse:
        """Raw scores (logits) of single responses, in order; otherwise as `annotate`.

        Items are ScoreItem objects or rows with `prompt` and `response`.
        """
        question = Question(SCORE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._all(question, items, *how)

    def score_iter(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> Iterator[Score | FailedScore]:
        """Raw scores of an input of any length, one by one and in order, as `annotate_iter`."""
        question = Question(SCORE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, items, *how)

    def rank(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 512,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> RankResponse:
        """Order the responses of each item, best first; otherwise as `annotate`.

        Items are RankItem objects or rows with `prompt` and `responses`, two to 64 of them.

        The arguments are those of `annotate`; batch_size is the most responses of a request, and
        those of an item are never parted.
        """
        question = Question(RANK, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._all(question, items, *how)

    def rank_iter(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 512,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> Iterator[Ranking | FailedAnnotation]:
        """Rankings of an input of any length, one by one and in order, as `annotate_iter`.

        The calibration temperature, which an answer of `rank` has, is in `model()`.
        """
        question = Question(RANK, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, items, *how)

    def embed(
        self,
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> EmbedResponse:
        """The embedding of each triplet, in order; otherwise as `annotate`.

        It is the mean of the last hidden states of the annotator's model over the tokens of both
        texts. A service with `--backend vllm` has none.
        """
        question = Question(EMBED, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._all(question, triplets, *how)

    def embed_iter(
        self,
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> Iterator[Embedding | FailedAnnotation]:
        """Embeddings of an input of any length, one by one and in order, as `annotate_iter`."""
        question = Question(EMBED, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, triplets, *how)

    def model(self) -> ModelInfo:
        """The annotator that the service has loaded, and the limits of the service."""
        return self._connection.send(_model())

    def change_model(self, annotator: str, *, golden: Iterable[GoldenTriplet] = ()) -> ModelChange:
        """Have the replica that answers load another annotator, and label by it from now on.

        Takes as long as loading takes: a client with a short `timeout` gives up before, and the
        replica goes on. Needs a key with the scope `admin`.

        Args:
            annotator: a folder of the service, or a Hub id.
            golden: triplets that it has to label so; else the present annotator stays.
        Raises: CwpoError, with the reason, where the present annotator stays.
        """
        return self._connection.send(_model_change(annotator, golden))

    def _all(
        self,
        question: Question[A],
        given: Rows,
        columns: Mapping[str, str] | None,
        batch_size: int,
        concurrency: int,
        progress: Progress | bool,
    ) -> A:
        """One answer about all rows."""
        batches = Batches(question, sent_rows(question.endpoint, given, columns), batch_size)
        answered = []
        with shown(progress, question.name, unit="rows", total=count(given)) as bar:
            for exchange in self._exchanges(batches, concurrency):
                answered.append(exchange)
                bar.advance(len(exchange.labels))
        return joined(answered)

    def _each(
        self,
        question: Question[A],
        given: Rows,
        columns: Mapping[str, str] | None,
        batch_size: int,
        concurrency: int,
        progress: Progress | bool,
    ) -> Iterator[Any]:
        """The labels of all rows, in order."""
        rows = sent_rows(question.endpoint, given, columns)
        batches = Batches(question, rows, batch_size, STREAMED_ROWS)
        in_order = InOrder()
        with shown(progress, question.name, unit="rows", total=count(given)) as bar:
            for exchange in self._exchanges(batches, concurrency):
                bar.advance(len(exchange.labels))
                yield from in_order.add(exchange.labels)

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
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> AnnotateResponse:
        """Label the triplets, in order; all labels are kept, which `annotate_iter` does not.

        A long input is sent in several requests: by prompt, and of no more triplets and bytes than
        the service takes (GET /model). A triplet that is too large for a request is an error, and
        the others are unharmed.

        Args:
            triplets: Triplet objects or dictionaries (also with TRL's `chosen` and `rejected`), in
                a list, an iterator or a `datasets.Dataset`; or a table of pandas, polars or Arrow.
                A row that is not valid is an error in its place.
            columns: the input's names of columns, by the names that are needed, such as
                {"prompt": "question"}.
            truncation: treatment of texts that are too long for the annotator: "error" makes the
                triplet an error, "prompt_left" drops the oldest tokens of the prompt.
            priority: "interactive" requests are answered before "batch" requests.
            revision: revision that the annotator has to have, as in `model.revision` of an answer;
                by default any, but one for all requests.
            batch_size: most triplets of a request.
            concurrency: number of requests that are sent at the same time.
            progress: shows how many rows have an answer, on stderr for True.
        Raises: DatasetError for an input that has no rows, none that is valid, or not the columns
            that are needed, which are then named.
        """
        question = Question(ANNOTATE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return await self._all(question, triplets, *how)

    def annotate_iter(
        self,
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> AsyncIterator[Annotation | FailedAnnotation]:
        """Label the triplets of an input of any length, and yield the labels in order.

        It is a method of its own, since `annotate` returns one answer with all labels, and so keeps
        them all: this one reads some thousand rows ahead of the label that it yields, and its
        memory stays the same however many there are. Arguments and errors are those of `annotate`;
        the errors come with the first label that is asked for.
        """
        question = Question(ANNOTATE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, triplets, *how)

    async def score(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> ScoreResponse:
        """Raw scores (logits) of single responses, in order; otherwise as `annotate`.

        Items are ScoreItem objects or rows with `prompt` and `response`.
        """
        question = Question(SCORE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return await self._all(question, items, *how)

    def score_iter(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> AsyncIterator[Score | FailedScore]:
        """Raw scores of an input of any length, one by one and in order, as `annotate_iter`."""
        question = Question(SCORE, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, items, *how)

    async def rank(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 512,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> RankResponse:
        """Order the responses of each item, best first; otherwise as `annotate`.

        Items are RankItem objects or rows with `prompt` and `responses`, two to 64 of them.

        The arguments are those of `annotate`; batch_size is the most responses of a request, and
        those of an item are never parted.
        """
        question = Question(RANK, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return await self._all(question, items, *how)

    def rank_iter(
        self,
        items: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 512,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> AsyncIterator[Ranking | FailedAnnotation]:
        """Rankings of an input of any length, one by one and in order, as `annotate_iter`.

        The calibration temperature, which an answer of `rank` has, is in `model()`.
        """
        question = Question(RANK, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, items, *how)

    async def embed(
        self,
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> EmbedResponse:
        """The embedding of each triplet, in order; otherwise as `annotate`.

        It is the mean of the last hidden states of the annotator's model over the tokens of both
        texts. A service with `--backend vllm` has none.
        """
        question = Question(EMBED, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return await self._all(question, triplets, *how)

    def embed_iter(
        self,
        triplets: Rows,
        *,
        columns: Mapping[str, str] | None = None,
        truncation: Truncation = "error",
        priority: Priority = "interactive",
        revision: str | None = None,
        batch_size: int = 256,
        concurrency: int = 4,
        progress: Progress | bool = False,
    ) -> AsyncIterator[Embedding | FailedAnnotation]:
        """Embeddings of an input of any length, one by one and in order, as `annotate_iter`."""
        question = Question(EMBED, truncation, priority, revision)
        how = (columns, batch_size, concurrency, progress)
        return self._each(question, triplets, *how)

    async def model(self) -> ModelInfo:
        """The annotator that the service has loaded, and the limits of the service."""
        return await self._connection.send(_model())

    async def change_model(
        self, annotator: str, *, golden: Iterable[GoldenTriplet] = ()
    ) -> ModelChange:
        """Have the replica that answers load another annotator, and label by it from now on.

        Takes as long as loading takes: a client with a short `timeout` gives up before, and the
        replica goes on. Needs a key with the scope `admin`.

        Args:
            annotator: a folder of the service, or a Hub id.
            golden: triplets that it has to label so; else the present annotator stays.
        Raises: CwpoError, with the reason, where the present annotator stays.
        """
        return await self._connection.send(_model_change(annotator, golden))

    async def _all(
        self,
        question: Question[A],
        given: Rows,
        columns: Mapping[str, str] | None,
        batch_size: int,
        concurrency: int,
        progress: Progress | bool,
    ) -> A:
        """One answer about all rows."""
        rows = sent_rows(question.endpoint, given, columns)
        batches = await asyncio.to_thread(Batches, question, rows, batch_size)
        answered = []
        with shown(progress, question.name, unit="rows", total=count(given)) as bar:
            async for exchange in self._exchanges(batches, concurrency):
                answered.append(exchange)
                bar.advance(len(exchange.labels))
        return joined(answered)

    async def _each(
        self,
        question: Question[A],
        given: Rows,
        columns: Mapping[str, str] | None,
        batch_size: int,
        concurrency: int,
        progress: Progress | bool,
    ) -> AsyncIterator[Any]:
        """The labels of all rows, in order."""
        rows = sent_rows(question.endpoint, given, columns)
        batches = await asyncio.to_thread(Batches, question, rows, batch_size, STREAMED_ROWS)
        in_order = InOrder()
        with shown(progress, question.name, unit="rows", total=count(given)) as bar:
            async with aclosing(self._exchanges(batches, concurrency)) as exchanges:
                async for exchange in exchanges:
                    bar.advance(len(exchange.labels))
                    for label in in_order.add(exchange.labels):
                        yield label

    async def _exchanges(
        self, batches: Batches[A], concurrency: int
    ) -> AsyncGenerator[Exchange[A]]:
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


def _model_change(annotator: str, golden: Iterable[GoldenTriplet]) -> Call[ModelChange]:
    try:
        body = SwapRequest(annotator=annotator, golden=list(golden))
    except ValidationError as error:
        raise CwpoError(f"the model cannot be changed: {mistake_in(error)}") from error
    return Call("POST", "/model", ModelChange, body=body)
