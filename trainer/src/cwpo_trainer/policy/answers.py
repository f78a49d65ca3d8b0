"""Which two of the answers sampled to a prompt are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cwpo.client import Client
from cwpo.types import Prompt, Score, ScoreItem, Truncation
from cwpo_annotator.confidence import confidence

_SCORED_AT_ONCE = 256

AS_SAMPLED = "confidence_as_sampled"
"""Column with the confidence in two answers that were not chosen for their scores."""


@dataclass(frozen=True, slots=True)
class ComparedAnswers:
    """What was sampled for a prompt.

    compared: the two answers to be annotated, or fewer.
    confidence: the annotator's in the first two answers, where others are compared.
    """

    compared: Sequence[str]
    confidence: float | None = None


def best_and_worst(
    prompts: Sequence[Prompt],
    of_prompts: Sequence[Sequence[str]],
    client: Client,
    truncation: Truncation,
    revision: str | None = None,
) -> list[ComparedAnswers]:
    """Of each prompt's answers the two that the annotator scores highest and lowest.

    Args:
        revision: that the annotator must have; by default any.
    """
    items = [
        (at, ScoreItem(prompt=prompts[at], response=answer))
        for at, answers in enumerate(of_prompts)
        for answer in answers
    ]
    scored: list[list[tuple[float, str]]] = [[] for _ in of_prompts]
    for start in range(0, len(items), _SCORED_AT_ONCE):
        part = items[start : start + _SCORED_AT_ONCE]
        asked = [item for _, item in part]
        answer = client.score(asked, truncation=truncation, revision=revision)
        for (at, item), score in zip(part, answer.scores, strict=True):
            if isinstance(score, Score):
                scored[at].append((score.score, item.response))
    return [_extremes(each) for each in scored]


def _extremes(scored: Sequence[tuple[float, str]]) -> ComparedAnswers:
    if len(scored) < 2:
        return ComparedAnswers([text for _, text in scored])
    (first, _), (second, _), *_ = scored
    (sure,) = confidence(np.array([first]), np.array([second]))
    return ComparedAnswers([max(scored)[1], min(scored)[1]], float(sure))
