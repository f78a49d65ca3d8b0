"""Comparison of policies with their reference and with a baseline, by what a judge scored.

The win share is the share of prompts on which the judge scores the policy's answer above that of
the reference. With a gold reward model as the judge, it is the paper's gold reward accuracy (GRA).
An answer that cannot be scored, such as an empty one, loses to any that can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo.datasets.triplets import by_reason
from cwpo.errors import DatasetError
from cwpo_trainer.evaluation.judging import Judgement
from cwpo_trainer.evaluation.metrics import (
    Comparison,
    Divergence,
    Estimate,
    PolicyMetrics,
    Writing,
)
from cwpo_trainer.intervals import bootstrap, count_needed, wilson

REFERENCE = "reference"
_THIRDS = 3
# Of resamples: the interval of an evaluation is always the same.
_SEED = 0

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of one model and its answers, one to each prompt.

    preferences: log-probabilities of chosen and rejected responses, shape (pairs, 2).
    texts: its answers; lengths: their tokens, shape (prompts,).
    ended: whether it ended each itself, shape (prompts,).
    log_ratios: log(policy / reference) of each, shape (prompts,), and the tokens that they are of;
        None where they cannot be compared, and for the reference.
    """

    judged: Judgement
    preferences: _Numbers
    texts: Sequence[str]
    lengths: NDArray[np.int64]
    ended: NDArray[np.bool_]
    log_ratios: tuple[_Numbers, NDArray[np.int64]] | None = None


def compare(
    observed: Mapping[str, Observed],
    left_out: Mapping[str, int],
    *,
    beta: float,
    baseline: str = REFERENCE,
) -> tuple[dict[str, PolicyMetrics], dict[str, Any]]:
    """Each policy's measures, and all results for run.json.

    A prompt on which the judge itself failed is left out for all policies.

    Args:
        observed: of the policies and of the reference, by name.
        left_out: number of prompts that the judge could not read, for each reason.
        beta: factor of the implicit reward.
        baseline: name of the model that the others are compared with.
    Raises: DatasetError where the judge failed on all prompts.
    """
    failures: dict[int, str] = {}
    for each in observed.values():
        failures |= each.judged.failures
    reference = observed[REFERENCE]
    compared = [at for at in range(len(reference.texts)) if at not in failures]
    left_out = Counter(left_out) + Counter(failures.values())
    if not compared:
        raise DatasetError(f"no prompt could be judged: {by_reason(left_out)}")
    metrics = {
        name: PolicyMetrics(
            **_preferences(beta * (each.preferences - reference.preferences)),
            **_win_shares(_wins(each, reference)[compared]),
            **_scores(each.judged, compared),
            writing=_writing(each, compared),
            divergence=_divergence(each),
        )
        for name, each in observed.items()
        if name != REFERENCE
    }
    for name, item in metrics.items():
        if name != baseline:
            item.comparison = _comparison(name, baseline, observed, compared)
    return metrics, {
        "pairs": len(reference.preferences),
        "prompts": len(compared),
        "prompts_left_out": dict(left_out),
        "baseline": baseline,
        **{
            f"reference_{name}": value
            for name, value in _scores(reference.judged, compared).items()
        },
        "reference_writing": _writing(reference, compared).model_dump(),
        "policies": {name: item.model_dump(mode="json") for name, item in metrics.items()},
    }


def _preferences(rewards: _Numbers) -> dict[str, float | None]:
    if not rewards.size:
        return {"preference_accuracy": None, "implicit_margin": None}
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "preference_accuracy": float(np.where(margins == 0, 0.5, margins > 0).mean()),
        "implicit_margin": float(margins.mean()),
    }


def _wins(one: Observed, other: Observed) -> _Numbers:
    """1 where the answer of the one scores higher, 0 where that of the other does, else a half."""
    ours, theirs = (np.nan_to_num(each.judged.scores, nan=-np.inf) for each in (one, other))
    return np.where(ours == theirs, 0.5, ours > theirs)


def _win_shares(wins: _Numbers) -> dict[str, Any]:
    low, high = wilson(float(wins.mean()), len(wins))
    thirds = [float(part.mean()) for part in np.array_split(wins, _THIRDS) if part.size]
    return {
        "win_share": float(wins.mean()),
        "low": low,
        "high": high,
        "win_share_thirds": thirds,
        "win_share_deviation": float(np.std(thirds, ddof=1)) if len(thirds) > 1 else None,
    }


def _scores(judged: Judgement, compared: Sequence[int]) -> dict[str, Any]:
    """Mean score of the answers that have one, their number, and that of the others by reason."""
    scored = [at for at in compared if at not in judged.unscored]
    return {
        "mean_score": float(judged.scores[scored].mean()) if scored else None,
        "scored": len(scored),
        "unscored": dict(Counter(judged.unscored[at] for at in compared if at in judged.unscored)),
    }


def _writing(one: Observed, compared: Sequence[int]) -> Writing:
    texts = [one.texts[at] for at in compared]
    # A text of one word or none repeats nothing.
    bigrams = [[*pairwise(words)] for words in map(str.split, texts)]
    return Writing(
        tokens=float(one.lengths[compared].mean()),
        ended=float(one.ended[compared].mean()),
        distinct=len({*texts}) / len(texts),
        distinct_bigrams=float(
            np.mean([len({*each}) / len(each) if each else 1.0 for each in bigrams])
        ),
    )


def _divergence(one: Observed) -> Divergence | None:
    """Over all answers: it has nothing to do with the judge."""
    if one.log_ratios is None:
        return None
    ratios, tokens = one.log_ratios
    return Divergence(
        answer=float(ratios.mean()), token=float(ratios.sum()) / max(1, int(tokens.sum()))
    )


def _comparison(
    name: str, baseline: str, observed: Mapping[str, Observed], compared: Sequence[int]
) -> Comparison:
    one, other = observed[name], observed[baseline]
    wins, of_baseline = (_wins(each, observed[REFERENCE]) for each in (one, other))
    differences = (wins - of_baseline)[compared]
    gaps = (one.judged.scores - other.judged.scores)[compared]
    gaps = gaps[np.isfinite(gaps)]
    higher = _wins(one, other)[compared]
    longer = (one.lengths > other.lengths)[compared]
    length = float(other.lengths[compared].mean())
    return Comparison(
        baseline=baseline,
        win_share=_estimate(differences),
        reward_gap=_estimate(gaps) if gaps.size else None,
        higher=float(higher.mean()),
        longer=float(longer.mean()),
        higher_if_longer=float(higher[longer].mean()) if longer.any() else None,
        higher_if_not=float(higher[~longer].mean()) if not longer.all() else None,
        length_ratio=float(one.lengths[compared].mean()) / length if length else None,
        prompts_needed=count_needed(differences) if len(differences) > 1 else None,
    )


def _estimate(values: _Numbers) -> Estimate:
    low, high = bootstrap(values, seed=_SEED)
    return Estimate(value=float(values.mean()), low=low, high=high, prompts=len(values))
