"""`cwpo report`: one self-contained HTML page about the outputs in a run folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from pydantic import JsonValue

from cwpo.errors import DatasetError
from cwpo_trainer.data.rows import file_rows
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import confidence_in
from cwpo_trainer.evaluation.metrics import AnnotatorMetrics, Assessment
from cwpo_trainer.report import figures
from cwpo_trainer.run.folder import (
    LOG_NAME,
    MISTAKES_NAME,
    RECORD_NAME,
    REPORT_NAME,
    SAMPLES_NAME,
    Kind,
    RunRecord,
    read_lines,
    read_record,
)

SAMPLES = 6
_WEIGHTED = ("weighted.parquet", "weighted.jsonl")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """The output folder of one finished command."""

    name: str
    folder: Path
    record: RunRecord

    @property
    def log(self) -> list[dict[str, Any]]:
        """The steps of its training log."""
        return [line for line in read_lines(self.folder / LOG_NAME) if "loss" in line]


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


def write_report(folder: Path, weighted: Path | None = None) -> Path:
    """Write RUN/report.html and return its path.

    Raises: DatasetError if the folder has nothing to report on.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    runs = _finished_runs(folder)
    weighted = weighted or next(
        (folder / name for name in _WEIGHTED if (folder / name).is_file()), None
    )
    if not runs and weighted is None:
        raise DatasetError(
            f"{folder}: no {RECORD_NAME} and no weighted dataset below it: run commands with an "
            "--output in this folder first"
        )
    measured = _annotator_metrics(runs)
    assessed = _latest_assessment(runs)
    confidences = None if weighted is None else read_confidences(weighted)
    policies = [run for run in runs if run.record.kind == "evaluate-policy"]
    page = _template().render(
        title=folder.resolve().name,
        written=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        measured=measured,
        assessed=None if assessed is None else _assessment(assessed),
        mistakes=[] if assessed is None else read_lines(assessed.folder / MISTAKES_NAME),
        temperature=_temperature(runs),
        confidences=None if confidences is None else _facts(confidences),
        figures=_figures(runs, measured, assessed, confidences),
        evaluations=[(run, read_lines(run.folder / SAMPLES_NAME)[:SAMPLES]) for run in policies],
        runs=runs,
    )
    path = folder / REPORT_NAME
    path.write_text(page)
    return path


def read_confidences(path: Path) -> NDArray[np.float32]:
    """The confidence column of a weighted dataset. Raises: DatasetError if a row has none."""
    values = [*UnusedRows().used(file_rows(path), path, lambda _, row: confidence_in(row))]
    if not values:
        raise DatasetError(f"{path}: holds no pairs")
    return np.asarray(values, dtype=np.float32)


def _finished_runs(folder: Path) -> list[FinishedRun]:
    """The runs below the folder, in the order in which they were started."""
    found = [
        FinishedRun(_name(path.parent, folder), path.parent, read_record(path.parent))
        for path in folder.rglob(RECORD_NAME)
        if not any(name.startswith(".") for name in path.relative_to(folder).parts)
    ]
    return sorted(found, key=lambda run: run.record.started_at)


def _name(output: Path, folder: Path) -> str:
    return folder.resolve().name if output == folder else str(output.relative_to(folder))


def _annotator_metrics(runs: list[FinishedRun]) -> AnnotatorMetrics | None:
    """The latest figures: of `cwpo evaluate annotator`, or from the end of a training."""
    for run in reversed(runs):
        results: Any = run.record.results
        if run.record.kind == "evaluate-annotator":
            return AnnotatorMetrics.model_validate(results)
        if run.record.kind == "train-annotator" and "held_out" in results:
            return AnnotatorMetrics.model_validate(results["held_out"])
    return None


def _latest_assessment(runs: list[FinishedRun]) -> FinishedRun | None:
    """The latest run that tells which labels can be trusted; those of earlier versions do not."""
    for run in reversed(runs):
        if run.record.kind == "evaluate-annotator" and "verdict" in run.record.results:
            return run
    return None


def _assessment(run: FinishedRun) -> Assessment:
    return Assessment.model_validate(run.record.results)


def _temperature(runs: list[FinishedRun]) -> JsonValue:
    """The calibration temperature of the annotator that was trained last, if it has one."""
    trained = [run for run in runs if run.record.kind == "train-annotator"]
    return trained[-1].record.results.get("temperature") if trained else None


def _facts(confidences: NDArray[np.float32]) -> dict[str, float]:
    return {
        "pairs": len(confidences),
        "mean": float(confidences.mean()),
        "median": float(np.median(confidences)),
        "top_tenth_share": float(
            np.sort(confidences)[-max(1, len(confidences) // 10) :].sum()
            / max(float(confidences.sum()), 1e-12)
        ),
    }


def _figures(
    runs: list[FinishedRun],
    measured: AnnotatorMetrics | None,
    assessed: FinishedRun | None,
    confidences: NDArray[np.float32] | None,
) -> list[FigureText]:
    drawn = []
    if confidences is not None:
        drawn.append(
            FigureText(
                "Confidence of the annotator",
                figures.confidence_histogram(confidences),
                "Confidence of every pair in the weighted dataset. A pair with a confidence near 0 "
                "has almost no weight in the loss, one near 1 has full weight.",
            )
        )
    if measured is not None:
        drawn.append(
            FigureText(
                "Accuracy of the annotator by confidence",
                figures.accuracy_by_confidence(measured.bins),
                f"{measured.pairs:,} held-out pairs in bins of equal size, least confident first. "
                "If the bars rise to the right, weighting by confidence is useful. A bar above the "
                "line means that the annotator is right more often than it expects. Thin lines are "
                "95 % intervals.",
            )
        )
    if measured is not None and assessed is not None:
        drawn += _assessment_figures(measured, _assessment(assessed))
    drawn += _training_figures(runs)
    return drawn


def _assessment_figures(measured: AnnotatorMetrics, found: Assessment) -> list[FigureText]:
    certified = None if found.certificate is None else found.certificate.coverage
    coverage = figures.accuracy_by_coverage(
        measured.coverage, max_error=found.max_error, certified=certified
    )
    return [
        FigureText(
            "Accuracy of the annotator by coverage",
            coverage,
            "Accuracy on the most confident pairs, for each share of them. The band is the 95 % "
            "interval at each point. A certificate needs more than a band above the line: see the "
            "verdict.",
        ),
        FigureText(
            "Calibration of the annotator",
            figures.reliability(measured.bins),
            "On the dotted line, labels are right as often as their confidence says. Mean gap "
            f"{measured.ece:.3f}, Brier score {_figure(measured.brier)}; calibrated "
            f"{_figure(measured.calibrated_ece)} and {_figure(measured.calibrated_brier)}.",
        ),
    ]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _training_figures(runs: list[FinishedRun]) -> list[FigureText]:
    drawn = []
    for curve in _CURVES:
        logs = {run.name: run.log for run in runs if run.record.kind in curve.kinds}
        if any(logs.values()):
            svg = figures.curves(logs, curve.value, curve.label)
            drawn.append(FigureText(curve.title, svg, curve.caption))
    return drawn


def _standard_error(share: float, count: int) -> str:
    """Standard error of a share among `count` draws, in per cent."""
    return f"{100 * math.sqrt(share * (1 - share) / count):.1f}"


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("cwpo_trainer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["figure"] = _figure
    environment.filters["standard_error"] = _standard_error
    return environment.get_template("report.html")
