"""From a request to its answer: tokenise on one thread, score in batches on another, label."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal, TypeVar

import numpy as np

from cwpo.errors import CwpoError
from cwpo.types import (
    AnnotateRequest,
    FailedScore,
    GoldenTriplet,
    ItemError,
    ModelInfo,
    Score,
    ScoreRequest,
    ScoreResponse,
    Usage,
)
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.base import EncodedPair, EncodedText
from cwpo_annotator.labels import no_score
from cwpo_service.admission import Room
from cwpo_service.batcher import Batcher
from cwpo_service.hosted import Hosted, check_golden, check_scores
from cwpo_service.journey import Journey
from cwpo_service.metrics import Metrics
from cwpo_service.problems import ProblemError
from cwpo_service.settings import ServeSettings

T = TypeVar("T")

Phase = Literal["loading", "ready", "draining", "failed"]

_RETRY_AFTER = {"loading": 10, "draining": 5, "failed": 30}


class Inference:
    """The hosted annotator, from its loading to its last answer."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.phase: Phase = "loading"
        self.failure: CwpoError | None = None
        self._settings = settings
        self._metrics = metrics
        self._hosted: Hosted | None = None
        self._is_swapping = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="tokeniser")
        self._batcher = Batcher(
            metrics,
            budget=lambda: settings.token_budget or self.annotator.backend.batch_tokens,
            bound=settings.queue_tokens,
            probe=lambda: check_scores(self.annotator),
        )
        metrics.watch_padding(self._padding)

    async def load(self, factory: Callable[[], Annotator]) -> None:
        """Load the annotator on the device thread; what goes wrong becomes `failure`."""
        loop = asyncio.get_running_loop()
        try:
            annotator = await loop.run_in_executor(self._batcher.device, factory)
        except CwpoError as error:
            self.phase, self.failure = "failed", error
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            name = self._settings.annotator
            self.phase = "failed"
            self.failure = CwpoError(f"{name}: the annotator cannot be loaded: {reason}")
        else:
            self._hosted = self._host(annotator)
            self._batcher.start()
            if self.phase == "loading":
                self.phase = "ready"

    async def swap(self, load: Callable[[], Annotator], golden: Sequence[GoldenTriplet]) -> None:
        """Load an annotator beside the present one, check it, and answer by it from now on.

        Requests that are under way are answered by the annotator that they began with, and no
        batch holds items of both.
        Raises: ProblemError, 409 while another one is loaded, 503 while no annotator serves;
            CwpoError for one that cannot be loaded or labels wrong: the present one stays.
        """
        self.check_accepting()
        if self._is_swapping:
            raise ProblemError(409, "another annotator is being loaded", reason="conflict")
        self._is_swapping = True
        try:
            annotator = await asyncio.to_thread(_loaded, load)
            try:
                # On the device's own thread, so that it falls between two batches.
                await asyncio.get_running_loop().run_in_executor(
                    self._batcher.device, check_golden, annotator, golden
                )
            except Exception:
                annotator.backend.close()
                raise
            before, self._hosted = self._hosted, self._host(annotator)
            if before is not None:
                before.retire()
        finally:
            self._is_swapping = False

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; return when the accepted ones are answered, or the time is up."""
        self.phase = "draining"
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def close(self) -> None:
        """Let go of the annotator once the device has done its last batch; stop the threads."""
        if self._hosted is not None:
            self._batcher.then(self._hosted.annotator.backend.close)
        self._batcher.stop()
        self._tokeniser.shutdown(wait=False, cancel_futures=True)

    @property
    def is_idle(self) -> bool:
        """Whether none of the threads is at work."""
        is_busy = self._is_swapping or self._batcher.scoring_seconds or self._active
        return self._hosted is not None and not is_busy

    def check_alive(self) -> None:
        """Raises: ProblemError, 503, once only a restart can help."""
        self._batcher.check_running()
        seconds = self._batcher.scoring_seconds
        if seconds > self._settings.stuck_seconds:
            raise ProblemError(
                503, f"a batch is stuck on the device for {seconds:.0f} s", reason="stuck"
            )

    @property
    def annotator(self) -> Annotator:
        """The loaded annotator. Raises: ProblemError, 503 while there is none."""
        if self._hosted is None:
            raise self._unavailable()
        return self._hosted.annotator

    def info(self) -> ModelInfo:
        """What is loaded, and the limits."""
        annotator = self.annotator
        return ModelInfo(
            **annotator.model.model_dump(),
            backend=annotator.backend.name,
            device=annotator.backend.device,
            dtype=annotator.backend.dtype,
            max_length=annotator.encoder.max_length,
            max_triplets=self._settings.max_triplets,
            max_body_bytes=self._settings.max_body_bytes,
            temperature=annotator.temperature,
            confidence_quantiles=annotator.confidence_quantiles,
        )

    def check_accepting(self) -> None:
        """Raises: ProblemError, 503 while new work is not accepted."""
        if self.phase != "ready":
            raise self._unavailable()

    def check_not_draining(self) -> None:
        """Raises: ProblemError, 503 while the service drains; files and jobs need no annotator."""
        if self.phase == "draining":
            raise self._unavailable()

    def admit(self, size: int) -> None:
        """Whether a request with a body of so many bytes may come in. Raises: as room does."""
        self.check_accepting()
        self._batcher.check_running()
        self._batcher.admission.check(size)

    def room(self, size: int) -> AbstractContextManager[Room]:
        """Room in the queue for a body of so many bytes.

        Raises: ProblemError, 429 while too much waits already, 503 while nothing is accepted.
        """
        self.check_accepting()
        self._batcher.check_running()
        return self._batcher.admission.room(size)

    async def annotate(self, request: AnnotateRequest, room: Room) -> dict[str, Any]:
        """Label the triplets, in order; the fields of AnnotateResponse.

        Making a model of every row would take longer than all else that is done for a request.
        Raises: ProblemError, 413, 500 or 503.
        """
        triplets = request.triplets
        self._check_count(len(triplets), "triplets")
        with self._accepted() as annotator:
            encoded = await self._encode(
                room.journey, lambda: annotator.encode(triplets, request.truncation)
            )
            pairs = [item for item in encoded if isinstance(item, EncodedPair)]
            scores = await self._batcher.score(pairs, annotator.score_pairs, request.priority, room)
        ids = [str(i) if t.id is None else t.id for i, t in enumerate(triplets)]
        labels = annotator.label(ids, encoded, scores)
        self._metrics.count(labels)
        usage = Usage(triplets=len(triplets), tokens=room.journey.tokens)
        return {"annotations": labels.rows(), "model": annotator.model, "usage": usage}

    async def score(
        self, request: ScoreRequest, room: Room, *, limit: bool = True
    ) -> ScoreResponse:
        """Score the items, in order. Raises: ProblemError, 413 (if limit), 500 or 503."""
        if limit:
            self._check_count(len(request.items), "items")
        with self._accepted() as annotator:
            encoded = await self._encode(
                room.journey, lambda: annotator.encode_texts(request.items, request.truncation)
            )
            texts = [item for item in encoded if isinstance(item, EncodedText)]
            scores = await self._batcher.score(texts, annotator.score_texts, request.priority, room)
        values = iter(scores)
        return ScoreResponse(
            scores=[
                FailedScore(error=item)
                if isinstance(item, ItemError)
                else _score(next(values), item.truncated)
                for item in encoded
            ],
            model=annotator.model,
            usage=Usage(triplets=len(request.items), tokens=room.journey.tokens),
        )

    async def _encode(self, journey: Journey, work: Callable[[], Sequence[T]]) -> Sequence[T]:
        begun = time.perf_counter()
        encoded = await asyncio.get_running_loop().run_in_executor(self._tokeniser, work)
        ended = time.perf_counter()
        self._metrics.tokenise_seconds.observe(ended - begun)
        journey.items = len(encoded)
        journey.stages["tokenise"] = (begun, ended)
        return encoded

    @contextmanager
    def _accepted(self) -> Iterator[Annotator]:
        self.check_accepting()
        self._active += 1
        self._idle.clear()
        try:
            assert self._hosted is not None  # noqa: S101
            with self._hosted.used() as annotator:
                yield annotator
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    def _host(self, annotator: Annotator) -> Hosted:
        self._metrics.drift.expect(annotator.confidence_quantiles)
        # Queued on the device: a batch of a request that was given up may still be there.
        return Hosted(annotator, lambda: self._batcher.then(annotator.backend.close))

    def _padding(self) -> float:
        # Most backends pack their rows, or leave them to another server.
        return getattr(self._hosted.annotator.backend, "padding", 0.0) if self._hosted else 0.0

    def _check_count(self, count: int, what: str) -> None:
        limit = self._settings.max_triplets
        if count > limit:
            raise ProblemError(
                413, f"{what}: {count:,} of them, at most {limit:,} a request", reason="too_large"
            )

    def _unavailable(self) -> ProblemError:
        phase = self.phase
        return ProblemError(
            503,
            f"the service is {phase}" if phase != "failed" else "the annotator cannot be loaded",
            reason=phase,
            retry_after=_RETRY_AFTER.get(phase),
        )


def _loaded(load: Callable[[], Annotator]) -> Annotator:
    try:
        return load()
    except CwpoError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise CwpoError(f"the annotator cannot be loaded: {reason}") from error


def _score(value: np.float32, truncated: bool) -> Score | FailedScore:
    if not np.isfinite(value):
        return FailedScore(error=no_score(np.array([value])))
    return Score(score=float(value), truncated=truncated)
