"""Checks a loaded annotator on triplets with known labels."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose

from cwpo.errors import CwpoError
from cwpo.types import FailedAnnotation, GoldenTriplet, Triplet
from cwpo_annotator.annotator import Annotator

_QUESTION = "What is the capital of France?"
_BUILT_IN = (
    Triplet(prompt=_QUESTION, response_a="Paris.", response_b="I will not tell you."),
    Triplet(prompt=_QUESTION, response_a="I will not tell you.", response_b="Paris."),
)
# Much larger than rounding differences of bfloat16, much smaller than a real difference.
_TOLERANCE = 0.1


class GoldenError(CwpoError):
    """The annotator was loaded, but its labels are wrong."""


def check_scores(annotator: Annotator) -> None:
    """Score one built-in triplet.

    Raises: GoldenError if the triplet has no finite score; any error of the backend.
    """
    (label,) = annotator.annotate(_BUILT_IN[:1])
    if isinstance(label, FailedAnnotation):
        raise _unscored(annotator, label)


def check_golden(annotator: Annotator, golden: Sequence[GoldenTriplet]) -> None:
    """Label two built-in triplets and the golden ones, and compare the labels.

    Raises: GoldenError for a score that is not finite, a score that depends on the order of the
        responses, or a golden triplet with a different label than expected.
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
        raise GoldenError(
            f"{name}: the score of a response depends on the order of the two responses"
        )
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
    return GoldenError(f"{name}: a built-in triplet could not be scored: {failed.error.detail}")


def _close(score: float, other: float) -> bool:
    return isclose(score, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
