"""The tables of the report across runs, which are also in its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, JsonValue

from cwpo_trainer.evaluation.comparison import REFERENCE
from cwpo_trainer.evaluation.metrics import PolicyMetrics, WinRate, Writing
from cwpo_trainer.report.finished_runs import FinishedRun, PolicyRun


class PolicyRow(BaseModel):
    """A model in an evaluation; `metrics` and `by_llm` are None for the reference.

    win_rate: of the LLM judge; None without one.
    """

    evaluation: str
    policy: str
    is_baseline: bool
    metrics: PolicyMetrics | None
    mean_score: float | None
    scored: int | None
    writing: Writing | None
    win_rate: WinRate | None = None


class AnnotatorRow(BaseModel):
    """What is known of an annotator's labels.

    certified: share of certified labels; None where that was not tried, 0 where there is none.
    """

    run: str
    kind: str
    pairs: int
    accuracy: float
    low: float | None
    high: float | None
    surest_tenth: float
    ece: float
    certified: float | None


class TrainingRow(BaseModel):
    """One training: what, on what, how, and where it ended.

    loss: mean over the last tenth of the log, before weighting where the log has that.
    """

    run: str
    kind: str
    model: JsonValue
    objective: str
    pairs: JsonValue
    steps: int
    loss: float | None
    seconds: float


def policy_rows(evaluations: Sequence[PolicyRun]) -> list[PolicyRow]:
    """The reference and all policies of each evaluation."""
    return [row for evaluation in evaluations for row in _of_evaluation(evaluation)]


def _of_evaluation(evaluation: PolicyRun) -> Iterator[PolicyRow]:
    results, baseline = evaluation.results, evaluation.baseline
    yield PolicyRow(
        evaluation=evaluation.name,
        policy=REFERENCE,
        is_baseline=baseline == REFERENCE,
        metrics=None,
        mean_score=results["reference_mean_score"],
        scored=results.get("reference_scored") if results.get("reference_unscored") else None,
        writing=evaluation.reference_writing,
    )
    rates = {} if evaluation.by_llm is None else evaluation.by_llm.policies
    for name, metrics in evaluation.policies.items():
        yield PolicyRow(
            evaluation=evaluation.name,
            policy=name,
            is_baseline=baseline == name,
            metrics=metrics,
            mean_score=metrics.mean_score,
            scored=metrics.scored if metrics.unscored else None,
            writing=metrics.writing,
            win_rate=rates.get(name),
        )


def annotator_rows(runs: Sequence[FinishedRun]) -> list[AnnotatorRow]:
    """All runs that measured an annotator."""
    rows = []
    for run in runs:
        measured = run.measured
        if measured is None:
            continue
        certified = None
        if run.assessed is not None:
            certificate = run.assessed.certificate
            certified = 0.0 if certificate is None else certificate.coverage
        rows.append(
            AnnotatorRow(
                run=run.name,
                kind=run.record.kind,
                pairs=measured.pairs,
                accuracy=measured.accuracy,
                low=measured.low,
                high=measured.high,
                surest_tenth=measured.bins[-1].accuracy,
                ece=measured.ece,
                certified=certified,
            )
        )
    return rows


def training_rows(runs: Sequence[FinishedRun]) -> list[TrainingRow]:
    """All runs that trained something."""
    rows = []
    for run in runs:
        if run.record.kind.startswith("evaluate"):
            continue
        settings, log = run.record.settings, run.log
        last = log[-max(1, len(log) // 10) :]
        losses = [float(line.get("unweighted_loss", line["loss"])) for line in last]
        rows.append(
            TrainingRow(
                run=run.name,
                kind=run.record.kind,
                model=settings.get("model"),
                objective=_objective(settings),
                pairs=run.record.results.get("pairs"),
                steps=int(log[-1]["step"]) if log else 0,
                loss=sum(losses) / len(losses) if losses else None,
                seconds=run.record.seconds,
            )
        )
    return rows


def _objective(settings: dict[str, JsonValue]) -> str:
    """Such as "dpo, weight confidence, labels human"."""
    parts = [settings.get("objective") or settings.get("loss")]
    if settings.get("labels") == "human":
        parts.append("human labels")
    elif settings.get("weight"):
        parts.append(f"weight {settings['weight']}")
    if settings.get("lora"):
        parts.append("LoRA")
    return ", ".join(str(part) for part in parts if part)
