"""What is read from outputs of evaluations: the place that knows their settings and results.

A change of `cwpo evaluate policy` is a change of the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cwpo_trainer.reproduction.method import Place
from cwpo_trainer.reproduction.scale import Scale
from cwpo_trainer.reproduction.step import Output, Step
from cwpo_trainer.run.folder import RunRecord

_PERCENT = 100


@dataclass(frozen=True)
class Figure:
    """A measured figure; low, high: its 95 % interval; spread: its ± within one run."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Reading:
    """A figure in the run.json of a step's output.

    read: from the record to the figure. Raises: KeyError or TypeError where it is not there.
    """

    step: Step
    read: Callable[[RunRecord], Figure]


def accuracy(scale: Scale, annotator: Output, pairs: Place) -> Reading:
    """Agreement of the annotator with the labels of these pairs, in per cent."""
    return Reading(_assessment(scale, annotator, pairs), _accuracy)


def disagreement(scale: Scale, annotator: Output, pairs: Place) -> Reading:
    """Share of the labels that the annotator disagrees with, in per cent (Fig. 8)."""
    return Reading(_assessment(scale, annotator, pairs), _disagreement)


def accuracy_of_surest(scale: Scale, annotator: Output, pairs: Place, coverage: float) -> Reading:
    """Agreement on the most confident share of the pairs, in per cent."""
    return Reading(
        _assessment(scale, annotator, pairs), partial(_accuracy_of_surest, coverage=coverage)
    )


def confidence(scale: Scale, annotator: Output, pairs: Place, tenth: int | None = None) -> Reading:
    """Mean confidence on these pairs, or the quantile at tenths, from 0 to 10."""
    return Reading(_assessment(scale, annotator, pairs), partial(_confidence, tenth=tenth))


def seconds(made: Output) -> Reading:
    """Seconds that a command took."""
    return Reading(made.step, lambda record: Figure(record.seconds))


def policy_evaluation(
    scale: Scale,
    policies: Sequence[Output],
    reference: Output,
    judge: Place,
    prompts: Place,
    **more: Any,
) -> Step:
    """One evaluation of policies that started from one reference, which answers once for all.

    Args:
        more: settings of `cwpo evaluate policy` besides those of the scale, such as baseline.
    """
    settings = {
        "policy": tuple({policy.step.name: policy for policy in policies}.values()),
        "reference": reference,
        "judge": judge,
        "data": prompts,
        **scale.evaluation,
        **more,
    }
    return Step("evaluate policy", "evaluation", settings)


def gold_reward_accuracy(evaluation: Step, policy: Output) -> Reading:
    """GRA in per cent: how often the judge scores the policy's answer above the reference's.

    spread: standard deviation over three disjoint thirds of the prompts, as in Table 20.
    """
    return Reading(evaluation, partial(_win_share, name=policy.step.name))


def accuracy_gain(evaluation: Step, policy: Output) -> Reading:
    """GRA of the policy less that of the baseline, in per cent, with a paired interval."""
    return Reading(evaluation, partial(_gain, name=policy.step.name))


def reward_gap(evaluation: Step, policy: Output) -> Reading:
    """Mean of R*(policy) - R*(baseline), in the judge's units (Fig. 5)."""
    return Reading(evaluation, partial(_reward_gap, name=policy.step.name))


def unscored(evaluation: Step, policy: Output) -> Reading:
    """Share of the answers that the judge cannot score, such as empty ones, in per cent.

    They lose, and the rewards that are compared are without them.
    """
    return Reading(evaluation, partial(_unscored, name=policy.step.name))


def win_rate(evaluation: Step, policy: Output) -> Reading:
    """How often an LLM prefers the policy's answer to the chosen response, in per cent."""
    return Reading(evaluation, partial(_win_rate, name=policy.step.name))


def _assessment(scale: Scale, annotator: Output, pairs: Place) -> Step:
    threads = {name: scale.evaluation[name] for name in ("threads",) if name in scale.evaluation}
    return Step(
        "evaluate annotator", "assessment", {"annotator": annotator, "data": pairs, **threads}
    )


def _win_share(record: RunRecord, name: str) -> Figure:
    found = _of_policy(record, name)
    deviation = found["win_share_deviation"]
    return _in_percent(found["win_share"], found["low"], found["high"], deviation)


def _gain(record: RunRecord, name: str) -> Figure:
    found = _of_policy(record, name)["comparison"]["win_share"]
    return _in_percent(found["value"], found["low"], found["high"])


def _reward_gap(record: RunRecord, name: str) -> Figure:
    found = _of_policy(record, name)["comparison"]["reward_gap"]
    return Figure(found["value"], found["low"], found["high"])


def _unscored(record: RunRecord, name: str) -> Figure:
    results: Any = record.results
    return Figure(_PERCENT * (1 - _of_policy(record, name)["scored"] / results["prompts"]))


def _win_rate(record: RunRecord, name: str) -> Figure:
    results: Any = record.results
    found = results["llm_judge"]["policies"][name]["rate"]
    return _in_percent(found["value"], found["low"], found["high"])


def _of_policy(record: RunRecord, name: str) -> Any:
    results: Any = record.results
    return results["policies"][name]


def _accuracy(record: RunRecord) -> Figure:
    results: Any = record.results
    return _in_percent(results["accuracy"], results["low"], results["high"])


def _disagreement(record: RunRecord) -> Figure:
    results: Any = record.results
    return _in_percent(1 - results["accuracy"], 1 - results["high"], 1 - results["low"])


def _accuracy_of_surest(record: RunRecord, coverage: float) -> Figure:
    """At the coverage that is nearest to the wanted one: ties may have moved it."""
    results: Any = record.results
    point = min(results["coverage"], key=lambda point: abs(point["coverage"] - coverage))
    share = point["accuracy"]
    return _in_percent(share["value"], share["low"], share["high"])


def _confidence(record: RunRecord, tenth: int | None) -> Figure:
    results: Any = record.results
    if tenth is None:
        return Figure(results["mean_confidence"])
    return Figure(results["confidence_quantiles"][tenth])


def _in_percent(value: float, low: float, high: float, spread: float | None = None) -> Figure:
    scaled = None if spread is None else _PERCENT * spread
    return Figure(_PERCENT * value, _PERCENT * low, _PERCENT * high, scaled)
