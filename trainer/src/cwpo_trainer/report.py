"""`cwpo report`: one self-contained page over all that the commands left in a run folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import JsonValue

from cwpo.datasets import file_format, read_rows
from cwpo.errors import DatasetError
from cwpo_trainer import figures
from cwpo_trainer.evaluation.metrics import AnnotatorMetrics
from cwpo_trainer.record import (
    LOG_NAME,
    RECORD_NAME,
    REPORT_NAME,
    SAMPLES_NAME,
    Kind,
    Record,
    read_lines,
    read_record,
)

SAMPLES = 6
_WEIGHTED = ("weighted.parquet", "weighted.jsonl")


@dataclass(frozen=True, slots=True)
class Part:
    """One command's output folder."""

    name: str
    folder: Path
    record: Record

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


def write(run: Path, weighted: Path | None = None) -> Path:
    """Write RUN/report.html and return its path.

    Raises: DatasetError where the folder holds nothing to report.
    """
    if not run.is_dir():
        raise DatasetError(f"{run}: no such folder")
    parts = _parts(run)
    weighted = weighted or next((run / name for name in _WEIGHTED if (run / name).is_file()), None)
    if not parts and weighted is None:
        raise DatasetError(
            f"{run}: no {RECORD_NAME} and no weighted dataset below it: give the commands an "
            "--output in this folder first"
        )
    measured = _annotator_metrics(parts)
    confidences = None if weighted is None else read_confidences(weighted)
    policies = [part for part in parts if part.record.kind == "evaluate-policy"]
    page = _template().render(
        title=run.resolve().name,
        written=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        measured=measured,
        temperature=_temperature(parts),
        confidences=None if confidences is None else _facts(confidences),
        figures=_figures(parts, measured, confidences),
        evaluations=[(part, read_lines(part.folder / SAMPLES_NAME)[:SAMPLES]) for part in policies],
        parts=parts,
    )
    path = run / REPORT_NAME
    path.write_text(page)
    return path


def read_confidences(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The confidence column of a weighted dataset. Raises: DatasetError where a row has none."""
    values = []
    with path.open("rb") as stream:
        for number, row in read_rows(stream, file_format(path)):
            value = row.get("confidence") if isinstance(row, dict) else None
            if not isinstance(value, int | float):
                raise DatasetError(f"{path}: row {number}: confidence is missing")
            values.append(value)
    if not values:
        raise DatasetError(f"{path}: holds no pairs")
    return np.asarray(values, dtype=np.float32)


def _parts(run: Path) -> list[Part]:
    """The outputs below the run folder, in the order in which they were made."""
    found = [
        Part(str(path.parent.relative_to(run)), path.parent, read_record(path.parent))
        for path in run.rglob(RECORD_NAME)
        if not any(name.startswith(".") for name in path.relative_to(run).parts)
    ]
    return sorted(found, key=lambda part: part.record.started_at)


def _annotator_metrics(parts: list[Part]) -> AnnotatorMetrics | None:
    """Of the latest measurement: a separate one, or that at the end of training."""
    for part in reversed(parts):
        results: Any = part.record.results
        if part.record.kind == "evaluate-annotator":
            return AnnotatorMetrics.model_validate(results)
        if part.record.kind == "train-annotator" and "held_out" in results:
            return AnnotatorMetrics.model_validate(results["held_out"])
    return None


def _temperature(parts: list[Part]) -> JsonValue:
    """The calibration temperature of the annotator that was trained last, if it has one."""
    trained = [part for part in parts if part.record.kind == "train-annotator"]
    return trained[-1].record.results.get("temperature") if trained else None


def _facts(confidences: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, float]:
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
    parts: list[Part],
    measured: AnnotatorMetrics | None,
    confidences: np.ndarray[Any, np.dtype[np.float32]] | None,
) -> list[FigureText]:
    drawn = []
    if confidences is not None:
        drawn.append(
            FigureText(
                "How sure the annotator was",
                figures.confidence_histogram(confidences),
                "Confidence of every pair in the weighted dataset. A pair near 0 is a coin toss "
                "and hardly moves the policy; a pair near 1 counts in full.",
            )
        )
    if measured is not None:
        drawn.append(
            FigureText(
                "Does confidence mean anything?",
                figures.accuracy_by_confidence(measured.bins),
                f"{measured.pairs:,} held-out pairs in bins of equal size, least confident first. "
                "Bars that rise to the right say that weighting by confidence is worth while; bars "
                "over the line say that the annotator is more often right than it claims.",
            )
        )
    drawn += _training_figures(parts)
    return drawn


def _training_figures(parts: list[Part]) -> list[FigureText]:
    wanted: list[tuple[Kind, str, str, str, str]] = [
        ("train-annotator", "loss", "Training the annotator", "Bradley-Terry loss", _ANNOTATOR),
        ("sft", "loss", "Supervised fine-tuning", "loss a token", _SFT),
        ("align", "unweighted_loss", "Alignment: loss", "loss before weighting", _ALIGN_LOSS),
        ("align", "rewards/margins", "Alignment: margin", "implicit reward margin", _ALIGN_MARGIN),
    ]
    drawn = []
    for kind, value, title, label, caption in wanted:
        logs = {part.name: part.log for part in parts if part.record.kind == kind}
        if any(logs.values()):
            drawn.append(FigureText(title, figures.curves(logs, value, label), caption))
    return drawn


_ANNOTATOR = "Mean of -log sigmoid(score of chosen - score of rejected); 0.693 is knowing nothing."
_SFT = "Negative log-likelihood of the preferred responses; the prompt carries no loss."
_ALIGN_LOSS = (
    "The loss of each pair before its weight, so that runs with and without weights can be "
    "compared. All start at the same value: the policy still is its reference."
)
_ALIGN_MARGIN = (
    "How much more the policy has come to prefer the chosen to the rejected responses, measured "
    "against the reference; 0 at the start."
)


def _standard_error(share: float, count: int) -> str:
    """Of a share of `count` draws, in per cent."""
    return f"{100 * math.sqrt(share * (1 - share) / count):.1f}"


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("cwpo_trainer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["standard_error"] = _standard_error
    return environment.get_template("report.html")
