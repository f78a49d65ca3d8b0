"""The figures of the report, each with a caption that says how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cwpo_trainer.evaluation.comparison import REFERENCE
from cwpo_trainer.evaluation.metrics import (
    AnnotatorMetrics,
    Assessment,
    Estimate,
    PolicyMetrics,
)
from cwpo_trainer.report import figures
from cwpo_trainer.report.finished_runs import FinishedRun, PolicyRun
from cwpo_trainer.run.folder import Kind


@dataclass(frozen=True, slots=True)
class FigureText:
    """A figure with what it shows."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure of some commands' training logs: one of their values by step."""

    kinds: tuple[Kind, ...]
    value: str
    title: str
    label: str
    caption: str


_CURVES = (
    Curve(
        ("train-annotator",),
        "loss",
        "Training the annotator",
        "Bradley-Terry loss",
        "Mean of -log sigmoid(score of chosen - score of rejected); guessing gives 0.693.",
    ),
    Curve(
        ("sft",),
        "loss",
        "Supervised fine-tuning",
        "loss per token",
        "Negative log-likelihood of the preferred responses, without their prompts.",
    ),
    Curve(
        ("align", "online"),
        "unweighted_loss",
        "Alignment: loss",
        "loss before weighting",
        "Mean loss of the pairs before weighting, so that runs with and without weights can be "
        "compared. All runs start at the same value, because the policy starts as the reference.",
    ),
    Curve(
        ("align", "online"),
        "rewards/margins",
        "Alignment: margin",
        "implicit reward margin",
        "Implicit reward of the chosen responses minus that of the rejected ones: how much more "
        "the policy prefers the chosen responses than the reference does; 0 at the start.",
    ),
)


def three_digits(value: float | None) -> str:
    """A figure, or a dash for none."""
    return "–" if value is None else f"{value:.3f}"


def policy_figures(evaluations: Sequence[PolicyRun]) -> list[FigureText]:
    """GRA, differences from the baseline, reward gaps, and GRA over divergence."""
    is_one = len(evaluations) == 1
    named = [
        (name if is_one else f"{evaluation.name}: {name}", metrics)
        for evaluation in evaluations
        for name, metrics in evaluation.policies.items()
    ]
    won = [(name, _gra(each)) for name, each in named if each.low is not None]
    compared = [
        (f"{name} against {each.comparison.baseline}", each.comparison.win_share)
        for name, each in named
        if each.comparison is not None and each.comparison.baseline != REFERENCE
    ]
    drawn = []
    if won:
        drawn.append(
            FigureText(
                "Gold reward accuracy",
                figures.shares(won, middle=0.5, label="wins against the reference"),
                "Share of prompts on which the judge scores the policy's answer above that of the "
                "reference, with 95 % intervals; grey where it cannot be told from a draw.",
            )
        )
    if compared:
        drawn.append(
            FigureText(
                "Difference from the baseline",
                figures.shares(
                    compared, middle=0, label="gold reward accuracy less the baseline's"
                ),
                "With 95 % intervals of a paired bootstrap over prompts; grey where these are too "
                "few to tell who is better.",
            )
        )
    for evaluation in evaluations:
        drawn += _evaluation_figures(evaluation, "" if is_one else f" · {evaluation.name}")
    return drawn


def _evaluation_figures(evaluation: PolicyRun, name: str) -> Iterator[FigureText]:
    """Of one evaluation, so far as it tells: its reward gaps, and GRA over divergence."""
    gaps = {
        policy: evaluation.gaps(policy)
        for policy in evaluation.policies
        if policy != evaluation.baseline
    }
    gaps = {policy: values for policy, values in gaps.items() if values}
    if gaps:
        yield FigureText(
            f"Reward gap{name}",
            figures.reward_gaps(gaps, evaluation.baseline),
            "Difference in reward on each prompt, the prompts sorted by it. Where a line crosses 0 "
            "further left, the policy is better on more prompts; the area is what it gains and "
            "loses.",
        )
    diverged = [
        (policy, each.divergence.answer, _gra(each))
        for policy, each in evaluation.policies.items()
        if each.divergence is not None
    ]
    if diverged:
        yield FigureText(
            f"Reward and divergence{name}",
            figures.shares_by_divergence(diverged),
            "What a policy gained, and how far it went from the reference for it. Of two "
            "policies that win as much, the one further left has changed less.",
        )


def _gra(metrics: PolicyMetrics) -> Estimate:
    share = metrics.win_share
    return Estimate(
        value=share,
        low=share if metrics.low is None else metrics.low,
        high=share if metrics.high is None else metrics.high,
        prompts=metrics.scored + sum(metrics.unscored.values()),
    )


def annotator_figures(
    measured: Sequence[FinishedRun], confidences: Mapping[Path, NDArray[np.float32]]
) -> Iterator[FigureText]:
    """Confidences in datasets, and accuracy, coverage and calibration of annotators."""
    for path, values in confidences.items():
        name = "" if len(confidences) == 1 else f" · {path}"
        yield FigureText(
            f"Confidence of the annotator{name}",
            figures.confidence_histogram(values),
            "Confidence of every pair in the weighted dataset. A pair with a confidence near 0 "
            "has almost no weight in the loss, one near 1 has full weight.",
        )
    for run in measured:
        if run.measured is None:
            continue
        name = "" if len(measured) == 1 else f" · {run.name}"
        yield FigureText(
            f"Accuracy of the annotator by confidence{name}",
            figures.accuracy_by_confidence(run.measured.bins),
            f"{run.measured.pairs:,} held-out pairs in bins of equal size, least confident first. "
            "If the bars rise to the right, weighting by confidence is useful. A bar above the "
            "line means that the annotator is right more often than it expects. Thin lines are "
            "95 % intervals.",
        )
        if run.assessed is not None:
            yield from _assessment_figures(run.measured, run.assessed, name)


def _assessment_figures(
    measured: AnnotatorMetrics, found: Assessment, name: str
) -> Iterator[FigureText]:
    certified = None if found.certificate is None else found.certificate.coverage
    coverage = figures.accuracy_by_coverage(
        measured.coverage, max_error=found.max_error, certified=certified
    )
    yield FigureText(
        f"Accuracy of the annotator by coverage{name}",
        coverage,
        "Accuracy on the most confident pairs, for each share of them. The band is the 95 % "
        "interval at each point. A certificate needs more than a band above the line: see the "
        "verdict.",
    )
    yield FigureText(
        f"Calibration of the annotator{name}",
        figures.reliability(measured.bins),
        "On the dotted line, labels are right as often as their confidence says. Mean gap "
        f"{measured.ece:.3f}, Brier score {three_digits(measured.brier)}; calibrated "
        f"{three_digits(measured.calibrated_ece)} and "
        f"{three_digits(measured.calibrated_brier)}.",
    )
    if found.shift is not None and (texts := found.shift.embeddings) is not None:
        yield FigureText(
            f"Texts of {found.shift.data}{name}",
            figures.embeddings(texts.here, texts.there, found.shift.data),
            "Each point is a triplet: the mean of the annotator's last hidden states over its two "
            "texts. Where the others lie apart from the labelled pairs, what is measured on these "
            f"says little of them (AUC {texts.auc:.2f}, by chance up to {texts.chance:.2f}).",
        )


def training_figures(runs: Sequence[FinishedRun]) -> list[FigureText]:
    """Curves of the training logs."""
    drawn = []
    for curve in _CURVES:
        logs = {run.name: run.log for run in runs if run.record.kind in curve.kinds}
        if any(curve.value in line for log in logs.values() for line in log):
            svg = figures.curves(logs, curve.value, curve.label)
            drawn.append(FigureText(curve.title, svg, curve.caption))
    return drawn
