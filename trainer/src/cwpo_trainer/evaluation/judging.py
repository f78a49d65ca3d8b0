"""What a judge makes of prompts and of answers to them: scores, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cwpo.types import ItemError, Prompt, ScoreItem
from cwpo_annotator import Annotator
from cwpo_trainer.run.chunks import chunks

_JUDGED_AT_ONCE = 256
# Whether a prompt can be read is tried with the shortest of answers.
_SHORTEST = "."


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge made of one policy's answers.

    scores: shape (prompts,), NaN for an answer that has none.
    unscored: why, by place of the answer: the code of an ItemError that lies with the answer.
    failures: the same where it lies with the judge, for which no policy is to blame.
    """

    scores: NDArray[np.float64]
    unscored: Mapping[int, str]
    failures: Mapping[int, str]


def unreadable(annotator: Annotator, prompts: Sequence[Prompt]) -> dict[int, str]:
    """The prompts that the judge cannot read whole, by place, with the code of the reason."""
    items = [ScoreItem(prompt=prompt, response=_SHORTEST) for prompt in prompts]
    encoded = annotator.encode_texts(items, "error")
    return {at: item.code for at, item in enumerate(encoded) if isinstance(item, ItemError)}


def judge(
    annotator: Annotator, prompts: Sequence[Prompt], answers: Sequence[str], work: str
) -> Judgement:
    """Score each answer. Where a prompt leaves it too little room, the prompt's start is cut.

    Args:
        prompts: that the judge can read.
        work: what is judged, for the user.
    """
    items = [
        ScoreItem(prompt=prompt, response=answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    scores = np.full(len(items), np.nan)
    unscored: dict[int, str] = {}
    failures: dict[int, str] = {}
    for part in chunks(range(len(items)), _JUDGED_AT_ONCE, work=work, unit="answers"):
        encoded = annotator.encode_texts([items[at] for at in part], "prompt_left")
        of_part = dict(zip(part, encoded, strict=True))
        errors = {at: item.code for at, item in of_part.items() if isinstance(item, ItemError)}
        texts = {at: item for at, item in of_part.items() if not isinstance(item, ItemError)}
        found = annotator.score_texts([*texts.values()])
        for at, score, too_large in zip(texts, found.values, found.too_large, strict=True):
            if too_large:
                failures[at] = "out_of_memory"
            elif not np.isfinite(score):
                failures[at] = "non_finite_score"
            else:
                scores[at] = score
        unscored |= errors
    return Judgement(scores, unscored, failures)
