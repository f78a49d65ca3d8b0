"""Answers admitted requests: tokenises on one thread, scores in batches, and labels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cwpo.types import (
    AnnotateRequest,
    FailedScore,
    ItemError,
    ModelRef,
    Priority,
    Prompt,
    RankRequest,
    Score,
    ScoreRequest,
    ScoreResponse,
    Triplet,
    Usage,
)
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.encoded import EncodedPair, EncodedResponses, EncodedText
from cwpo_annotator.labels import no_score
from cwpo_annotator.rankings import texts_of
from cwpo_annotator.scores import Scores
from cwpo_service.problems import ProblemError
from cwpo_service.scoring.admission import Admission, Reservation
from cwpo_service.scoring.batcher import Batcher
from cwpo_service.scoring.hosting import Hosting
from cwpo_service.scoring.queue import Entry
from cwpo_service.telemetry.metrics import Metrics
from cwpo_service.telemetry.timings import Timings

T = TypeVar("T")

# Triplets of the service's own that are read at a time.
_OWN_TRIPLETS = 64
_DECIMALS = 4


class Inference:
    """Answers each admitted request with the annotator that is current when the request starts.

    Args:
        max_triplets: maximum number of triplets or items in a request; as many responses to rank
            as these have.
    """

    def __init__(
        self,
        hosting: Hosting,
        admission: Admission,
        batcher: Batcher,
        metrics: Metrics,
        *,
        max_triplets: int,
    ) -> None:
        self._hosting = hosting
        self._admission = admission
        self._batcher = batcher
        self._metrics = metrics
        self._max_triplets = max_triplets
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="tokeniser")

    def close(self) -> None:
        """Stop the tokeniser thread; waiting work is dropped."""
        self._tokeniser.shutdown(wait=False, cancel_futures=True)

    async def annotate(self, request: AnnotateRequest, reservation: Reservation) -> dict[str, Any]:
        """Label the triplets, in order.

        Returns: the fields of an AnnotateResponse as a dict, since creating a pydantic model for
            every row would take longer than the rest of the request.
        Raises: ProblemError, 413 for too many triplets; 503 as Hosting.used does; 500 or 503 as
            Batcher.score does.
        """
        triplets = request.triplets
        self._check_count(len(triplets), "triplets", self._max_triplets)
        with self._hosting.used(reservation.revision) as annotator:
            encoded, entry = await self._encode(
                lambda: _pairs(annotator, request), reservation.timings
            )
            scores = await self._score(entry, request.priority, reservation)
        ids = [str(i) if t.id is None else t.id for i, t in enumerate(triplets)]
        labels = annotator.label(ids, encoded, scores)
        self._metrics.count(labels)
        usage = Usage(triplets=len(triplets), tokens=reservation.timings.tokens)
        model = _signed(annotator, reservation.revision)
        return {"annotations": labels.rows(), "model": model, "usage": usage}

    async def embed(self, request: AnnotateRequest, reservation: Reservation) -> dict[str, Any]:
        """The embeddings of the triplets, in order.

        Returns: the fields of an EmbedResponse as a dict, as annotate does.
        Raises: NoEmbeddingsError; otherwise as annotate does.
        """
        triplets = request.triplets
        self._check_count(len(triplets), "triplets", self._max_triplets)
        with self._hosting.used(reservation.revision) as annotator:
            annotator.check_embeds()
            encoded, entry = await self._encode(
                lambda: _pairs_to_embed(annotator, request), reservation.timings
            )
            found = await self._score(entry, request.priority, reservation)
        ids = [str(i) if t.id is None else t.id for i, t in enumerate(triplets)]
        return {
            "embeddings": await asyncio.to_thread(_embeddings, ids, encoded, found),
            "model": _signed(annotator, reservation.revision),
            "usage": Usage(triplets=len(triplets), tokens=reservation.timings.tokens),
        }

    async def embeddings(
        self, triplets: Sequence[Triplet]
    ) -> list[NDArray[np.float32] | None] | None:
        """The embeddings of triplets of the service's own, each of shape (width,).

        They are read in the batch lane, a few at a time, so that requests are not refused for them.
        Returns: None for an annotator without embeddings, and for a triplet that it cannot read.
        Raises: ProblemError, 503 as Hosting.used does; 500 or 503 as Batcher.score does.
        """
        embeddings: list[NDArray[np.float32] | None] = []
        with self._hosting.used() as annotator:
            if not annotator.embeds:
                return None
            for start in range(0, len(triplets), _OWN_TRIPLETS):
                some = triplets[start : start + _OWN_TRIPLETS]
                request = AnnotateRequest(triplets=[*some], truncation="prompt_left")
                encoded, entry = await asyncio.get_running_loop().run_in_executor(
                    self._tokeniser, _pairs_to_embed, annotator, request
                )
                found = await self._batcher.score(entry, "batch")
                embeddings += [
                    None if isinstance(item, ItemError) else item for item in _found(encoded, found)
                ]
        return embeddings

    async def score(self, request: ScoreRequest, reservation: Reservation) -> ScoreResponse:
        """Score the items, in order.

        Raises: ProblemError, 413 for too many items; 503 as Hosting.used does; 500 or 503 as
            Batcher.score does.
        """
        self._check_count(len(request.items), "items", self._max_triplets)
        with self._hosting.used(reservation.revision) as annotator:
            encoded, entry = await self._encode(
                lambda: _texts(annotator, request), reservation.timings
            )
            scores = await self._score(entry, request.priority, reservation)
        values = zip(scores.values, scores.too_large, strict=True)
        return ScoreResponse(
            scores=[
                FailedScore(error=item)
                if isinstance(item, ItemError)
                else _score(*next(values), item.truncated)
                for item in encoded
            ],
            model=_signed(annotator, reservation.revision),
            usage=Usage(triplets=len(request.items), tokens=reservation.timings.tokens),
        )

    async def rank(self, request: RankRequest, reservation: Reservation) -> dict[str, Any]:
        """Order the responses of each item, in input order.

        Returns: the fields of a RankResponse as a dict, as annotate does.
        Raises: ProblemError, 413 for more responses than the largest number of triplets has; 429
            if too many tokens are waiting; otherwise as score does.
        """
        items = request.items
        texts = sum(len(item.responses) for item in items)
        self._check_count(texts, "responses", 2 * self._max_triplets)
        self._admission.extend(reservation, _size_in_pairs(request, reservation.size))
        with self._hosting.used(reservation.revision) as annotator:
            encoded, entry = await self._encode(
                lambda: _responses(annotator, request), reservation.timings
            )
            scores = await self._score(entry, request.priority, reservation)
        ids = [str(i) if item.id is None else item.id for i, item in enumerate(items)]
        rankings = annotator.order(ids, encoded, scores)
        self._metrics.count_rankings(rankings)
        answer = {
            "rankings": rankings,
            "model": _signed(annotator, reservation.revision),
            "usage": Usage(triplets=len(items), tokens=reservation.timings.tokens),
        }
        if annotator.temperature is not None:
            answer["temperature"] = annotator.temperature
        return answer

    async def _encode(
        self, work: Callable[[], tuple[Sequence[T], Entry]], timings: Timings
    ) -> tuple[Sequence[T], Entry]:
        """Items as token ids, with errors in their places, and the entry of those without one."""
        begun = time.perf_counter()
        encoded, entry = await asyncio.get_running_loop().run_in_executor(self._tokeniser, work)
        ended = time.perf_counter()
        self._metrics.tokenise_seconds.observe(ended - begun)
        timings.items = len(encoded)
        timings.tokens = sum(item.tokens for item in entry.items)
        timings.stages["tokenise"] = (begun, ended)
        return encoded, entry

    async def _score(self, entry: Entry, priority: Priority, reservation: Reservation) -> Scores:
        self._admission.settle(reservation, entry.tokens)
        scores = await self._batcher.score(entry, priority)
        if entry.begun is not None:
            stages = reservation.timings.stages
            stages["queue"] = (entry.since, entry.begun)
            stages["inference"] = (entry.begun, time.perf_counter())
        return scores

    def _check_count(self, count: int, what: str, limit: int) -> None:
        if count > limit:
            raise ProblemError(
                413,
                f"{count:,} {what}: a request may have at most {limit:,}",
                reason="too_large",
            )


def _pairs(
    annotator: Annotator, request: AnnotateRequest
) -> tuple[Sequence[EncodedPair | ItemError], Entry]:
    encoded = annotator.encode(request.triplets, request.truncation)
    pairs = [item for item in encoded if isinstance(item, EncodedPair)]
    return encoded, Entry(pairs, annotator.score_pairs, annotator.backend.reads_once)


def _pairs_to_embed(
    annotator: Annotator, request: AnnotateRequest
) -> tuple[Sequence[EncodedPair | ItemError], Entry]:
    encoded = annotator.encode(request.triplets, request.truncation)
    pairs = [item for item in encoded if isinstance(item, EncodedPair)]
    return encoded, Entry(pairs, annotator.embed_pairs)


def _found(
    encoded: Sequence[EncodedPair | ItemError], embeddings: Scores
) -> Iterator[NDArray[np.float32] | ItemError]:
    """The embedding of each item, or its error."""
    values = zip(embeddings.values, embeddings.too_large, strict=True)
    for item in encoded:
        if isinstance(item, ItemError):
            yield item
            continue
        embedding, is_too_large = next(values)
        is_known = not is_too_large and np.isfinite(embedding).all()
        yield embedding if is_known else no_score(bool(is_too_large))


def _embeddings(
    ids: Sequence[str], encoded: Sequence[EncodedPair | ItemError], embeddings: Scores
) -> list[dict[str, Any]]:
    """The rows of an EmbedResponse."""
    rows: list[dict[str, Any]] = []
    for id_, item, found in zip(ids, encoded, _found(encoded, embeddings), strict=True):
        if isinstance(item, ItemError) or isinstance(found, ItemError):
            rows.append({"id": id_, "error": found})
            continue
        # As float64 their shortest decimals are those that are meant.
        values = np.round(found.astype(np.float64), _DECIMALS).tolist()
        rows.append({"id": id_, "embedding": values, "truncated": item.truncated})
    return rows


def _texts(
    annotator: Annotator, request: ScoreRequest
) -> tuple[Sequence[EncodedText | ItemError], Entry]:
    encoded = annotator.encode_texts(request.items, request.truncation)
    texts = [item for item in encoded if isinstance(item, EncodedText)]
    return encoded, Entry(texts, annotator.score_texts, annotator.backend.reads_once)


def _responses(
    annotator: Annotator, request: RankRequest
) -> tuple[Sequence[EncodedResponses | ItemError], Entry]:
    encoded = annotator.encode_responses(request.items, request.truncation)
    return encoded, Entry(texts_of(encoded), annotator.score_texts, annotator.backend.reads_once)


def _size_in_pairs(request: RankRequest, size: int) -> int:
    """The size of the body, had it the prompt of each item for every two of its responses."""
    return size + sum(
        _characters(item.prompt) * (len(item.responses) - 2) // 2 for item in request.items
    )


def _characters(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def _signed(annotator: Annotator, revision: str | None) -> ModelRef:
    """The annotator by the revision that the request knows it by."""
    return ModelRef(name=annotator.model.name, revision=revision or annotator.model.revision)


def _score(value: np.float32, too_large: np.bool_, truncated: bool) -> Score | FailedScore:
    if not np.isfinite(value):
        return FailedScore(error=no_score(bool(too_large)))
    return Score(score=float(value), truncated=truncated)
