"""Loads the annotator of the service, replaces it, and frees it after its last use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from cwpo.errors import CwpoError, first_line
from cwpo.types import GoldenTriplet, ModelRef
from cwpo_annotator.annotator import Annotator
from cwpo_service.problems import ProblemError
from cwpo_service.scoring.device import Device
from cwpo_service.scoring.golden import check_golden, check_scores
from cwpo_service.telemetry.drift import ConfidenceDrift


class Hosting:
    """Holds the annotator that the service uses, and replaces it on request.

    Args:
        device: the thread that the annotator loads and scores on.
        load: loads an annotator by its name.
        drift: receives the confidence quantiles of each annotator when it comes into use.
    """

    def __init__(
        self, device: Device, load: Callable[[str], Annotator], drift: ConfidenceDrift
    ) -> None:
        self.failure: CwpoError | None = None
        self._device = device
        self._load = load
        self._drift = drift
        self._serving: LoadedAnnotator | None = None
        self._is_swapping = False

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        """Whether the annotator is being loaded, is ready, or could not be loaded."""
        if self.failure is not None:
            return "failed"
        return "loading" if self._serving is None else "ready"

    @property
    def annotator(self) -> Annotator:
        """The current annotator. Raises: ProblemError, 503 if none is loaded."""
        return self._current().annotator

    @property
    def batch_tokens(self) -> int:
        """Number of tokens in a full batch of the annotator. Raises: as `annotator` does."""
        return self.annotator.backend.batch_tokens

    def check_ready(self, revision: str | None = None) -> None:
        """Raises: as `used` does."""
        self._current(revision)

    def check(self) -> None:
        """Check the backend; this call blocks.

        Raises: as `annotator` does; BackendUnavailableError if the backend cannot be reached.
        """
        self.annotator.backend.check()

    @contextmanager
    def used(self, revision: str | None = None) -> Iterator[Annotator]:
        """The annotator, kept in memory until the block ends.

        Args:
            revision: revision that the annotator has to have; None for any.
        Raises: ProblemError, 503 if no annotator is loaded, or one of another revision.
        """
        with self._current(revision).used() as annotator:
            yield annotator

    async def load_first(self, factory: Callable[[], Annotator], name: str | None) -> None:
        """Load the first annotator; an error is not raised, but stored in `failure`.

        Args:
            name: name of the annotator, for the error message.
        """
        try:
            self._serve(await self._device.run(factory))
        except CwpoError as error:
            self.failure = error
        except Exception as error:
            self.failure = CwpoError(f"{name}: {_cannot_be_loaded(error)}")

    async def swap(self, name: str, golden: Sequence[GoldenTriplet]) -> None:
        """Load another annotator next to the current one, check it, and replace the current one.

        Requests in progress are answered by the annotator that they started with.
        Raises: ProblemError, 409 if another annotator is being loaded already, 503 if no
            annotator is loaded; CwpoError if the new annotator cannot be loaded or fails a
            check, in which case the current one remains.
        """
        before = self._current()
        if self._is_swapping:
            raise ProblemError(409, "another annotator is being loaded", reason="loading")
        self._is_swapping = True
        try:
            # Not on the device, which continues to score meanwhile.
            annotator = await asyncio.to_thread(self._loaded, name)
            try:
                # On the device, so that the check runs between two batches.
                await self._device.run(check_golden, annotator, golden)
            except Exception:
                annotator.backend.close()
                raise
            self._serve(annotator)
            before.retire()
        finally:
            self._is_swapping = False

    def probe(self) -> None:
        """Score a built-in triplet; call it on the device. Raises: as check_scores does."""
        check_scores(self.annotator)

    def padding(self) -> float:
        """Share of padding in the last batch, from 0 to 1; 0 for packed rows and for vLLM."""
        return 0.0 if self._serving is None else getattr(self.annotator.backend, "padding", 0.0)

    @property
    def is_idle(self) -> bool:
        """Whether no annotator is being loaded."""
        return self._serving is not None and not self._is_swapping

    def close(self) -> None:
        """Free the annotator after the device has scored its last batch."""
        if self._serving is not None:
            self._device.then(self.annotator.backend.close)

    def _current(self, revision: str | None = None) -> LoadedAnnotator:
        if self.failure is not None:
            raise ProblemError(
                503, "the annotator cannot be loaded", reason="failed", retry_after=30
            )
        if self._serving is None:
            raise ProblemError(503, "the service is loading", reason="loading", retry_after=10)
        annotator = self._serving.annotator
        if revision is not None and not annotator.has_revision(revision):
            raise _other_revision(annotator.model, revision)
        return self._serving

    def _loaded(self, name: str) -> Annotator:
        try:
            return self._load(name)
        except CwpoError:
            raise
        except Exception as error:
            raise CwpoError(_cannot_be_loaded(error)) from error

    def _serve(self, annotator: Annotator) -> None:
        self._drift.expect(annotator.confidence_quantiles)
        # Freed on the device, where a batch of a cancelled request may still wait.
        self._serving = LoadedAnnotator(
            annotator, lambda: self._device.then(annotator.backend.close)
        )


class LoadedAnnotator:
    """An annotator in memory, which is freed when it is retired and no request uses it.

    Args:
        free: function that frees the annotator.
    """

    def __init__(self, annotator: Annotator, free: Callable[[], object]) -> None:
        self.annotator = annotator
        self._free = free
        self._users = 0
        self._is_retired = False

    @contextmanager
    def used(self) -> Iterator[Annotator]:
        """The annotator, kept in memory until the block ends."""
        self._users += 1
        try:
            yield self.annotator
        finally:
            self._users -= 1
            self._free_if_done()

    def retire(self) -> None:
        """Free the annotator as soon as no request uses it; no new request may use it."""
        self._is_retired = True
        self._free_if_done()

    def _free_if_done(self) -> None:
        if self._is_retired and not self._users:
            self._free()


def _other_revision(hosted: ModelRef, asked: str) -> ProblemError:
    return ProblemError(
        503,
        f"this replica hosts annotator {hosted.name} at revision {hosted.revision}, and the "
        f"request is pinned to revision {asked[:64]}",
        reason="model_revision",
        # Another replica may host it. Load balancers choose one for each connection, so that the
        # next attempt needs a new one.
        retry_after=1,
        headers={"Connection": "close"},
    )


def _cannot_be_loaded(error: Exception) -> str:
    return f"the annotator cannot be loaded: {type(error).__name__}: {first_line(error)}"
