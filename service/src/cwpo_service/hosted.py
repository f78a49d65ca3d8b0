"""An annotator while it is hosted: who uses it, and whether it can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isclose

from cwpo.errors import CwpoError
from cwpo.types import FailedAnnotation, GoldenTriplet, Triplet
from cwpo_annotator.annotator import Annotator

_QUESTION = "What is the capital of France?"
_BUILT_IN = (
    Triplet(prompt=_QUESTION, response_a="Paris.", response_b="I will not tell you."),
    Triplet(prompt=_QUESTION, response_a="I will not tell you.", response_b="Paris."),
)
# Far more than bfloat16 differs between batches, far less than another answer.
_TOLERANCE = 0.1


class GoldenError(CwpoError):
    """An annotator that loads does not label as it should."""


class Hosted:
    """An annotator and the requests that use it; closed after the last one once it is retired.

    Args:
        close: frees the annotator.
    """

    def __init__(self, annotator: Annotator, close: Callable[[], object]) -> None:
        self.annotator = annotator
        self._close = close
        self._users = 0
        self._is_retired = False

    @contextmanager
    def used(self) -> Iterator[Annotator]:
        """The annotator, which stays loaded for so long."""
        self._users += 1
        try:
            yield self.annotator
        finally:
            self._users -= 1
            self._close_if_done()

    def retire(self) -> None:
        """No request will begin to use it any more."""
        self._is_retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_retired and not self._users:
            self._close()


def check_scores(annotator: Annotator) -> None:
    """Label one plain question. Raises: GoldenError, or what the backend does, if it cannot."""
    (label,) = annotator.annotate(_BUILT_IN[:1])
    if isinstance(label, FailedAnnotation):
        raise _unscored(annotator, label)


def check_golden(annotator: Annotator, golden: Sequence[GoldenTriplet]) -> None:
    """Label a few triplets, those of the caller as the caller does.

    Raises: GoldenError for a score that is not finite, a label that depends on the order of the
        responses, or a golden triplet that is labelled otherwise.
    """
    wanted = [triplet.preferred for triplet in golden]
    given = [Triplet(**triplet.model_dump(exclude={"preferred"})) for triplet in golden]
    forth, back, *labels = annotator.annotate([*_BUILT_IN, *given])
    name = annotator.model.name
    if isinstance(forth, FailedAnnotation) or isinstance(back, FailedAnnotation):
        failed = forth if isinstance(forth, FailedAnnotation) else back
        assert isinstance(failed, FailedAnnotation)  # noqa: S101
        raise _unscored(annotator, failed)
    if not (_close(forth.score_a, back.score_b) and _close(forth.score_b, back.score_a)):
        raise GoldenError(f"{name}: a response's score changes with the order of the two responses")
    for index, (label, preferred) in enumerate(zip(labels, wanted, strict=True)):
        if isinstance(label, FailedAnnotation):
            raise GoldenError(f"golden[{index}]: {label.error.detail}")
        if label.preferred != preferred:
            raise GoldenError(
                f"golden[{index}]: {name} prefers {label.preferred}, not {preferred}, "
                f"with confidence {label.confidence:.3f}"
            )


def _unscored(annotator: Annotator, failed: FailedAnnotation) -> GoldenError:
    name = annotator.model.name
    return GoldenError(f"{name}: a plain question could not be scored: {failed.error.detail}")


def _close(score: float, other: float) -> bool:
    return isclose(score, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
