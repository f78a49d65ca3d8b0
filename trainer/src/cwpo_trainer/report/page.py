"""`cwpo report`: one self-contained HTML page about one run or many, and its figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from pydantic import BaseModel, JsonValue

from cwpo.errors import DatasetError
from cwpo_trainer.data.rows import file_rows
from cwpo_trainer.data.unused_rows import UnusedRows
from cwpo_trainer.data.weighted import confidence_in
from cwpo_trainer.evaluation.metrics import PolicyMetrics
from cwpo_trainer.report.captions import (
    annotator_figures,
    policy_figures,
    three_digits,
    training_figures,
)
from cwpo_trainer.report.finished_runs import FinishedRun, PolicyRun, finished_runs
from cwpo_trainer.report.tables import annotator_rows, policy_rows, training_rows
from cwpo_trainer.run.folder import MISTAKES_NAME, RECORD_NAME, REPORT_NAME, read_lines

SAMPLES = 6
# By what they are of.
Tables = Mapping[str, Sequence[BaseModel]]
_WEIGHTED = ("weighted.parquet", "weighted.jsonl")


def write_report(
    folders: Sequence[Path], weighted: Path | None = None, page: Path | None = None
) -> Path:
    """Write the page on all runs in and below the folders, and its JSON beside it.

    Args:
        weighted: a dataset whose confidences are shown; by default that of each folder.
        page: by default report.html in the only folder.
    Returns: the path of the page.
    Raises: DatasetError if the folders have nothing to report on.
    """
    runs = finished_runs(folders)
    datasets = [weighted] if weighted is not None else [*_weighted_in(folders)]
    if not runs and not datasets:
        raise DatasetError(
            f"{', '.join(map(str, folders))}: no {RECORD_NAME} and no weighted dataset below: run "
            "commands with an --output in this folder first"
        )
    path = page or folders[0] / REPORT_NAME
    title = " · ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluations = [PolicyRun(run) for run in runs if run.record.kind == "evaluate-policy"]
    tables: Tables = {
        "policies": policy_rows(evaluations),
        "annotators": annotator_rows(runs),
        "trainings": training_rows(runs),
    }
    facts = {"title": title, "written": datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC")}
    path.write_text(_page(facts, tables, runs, evaluations, datasets))
    path.with_suffix(".json").write_text(_json(facts, tables, runs))
    return path


def _page(
    facts: Mapping[str, str],
    tables: Tables,
    runs: Sequence[FinishedRun],
    evaluations: Sequence[PolicyRun],
    datasets: Sequence[Path],
) -> str:
    measured = _measured(runs)
    confidences = {path: read_confidences(path) for path in datasets}
    page: str = _template().render(
        **facts,
        measured=measured[-1].measured if measured else None,
        assessments=[
            (run.name, run.assessed, read_lines(run.folder / MISTAKES_NAME))
            for run in measured
            if run.assessed is not None
        ],
        temperature=_temperature(runs),
        confidences=_facts(np.concatenate([*confidences.values()])) if confidences else None,
        tables=tables,
        policy_figures=policy_figures(evaluations),
        annotator_figures=[*annotator_figures(measured, confidences)],
        training_figures=training_figures(runs),
        evaluations=evaluations,
        best=_best(evaluations),
        samples=SAMPLES,
        runs=runs,
    )
    return page


def _json(facts: Mapping[str, str], tables: Tables, runs: Sequence[FinishedRun]) -> str:
    """The tables of the page and the record of each run."""
    report = {
        **facts,
        **{name: [row.model_dump(mode="json") for row in rows] for name, rows in tables.items()},
        "runs": [
            {"name": run.name, "folder": str(run.folder), **run.record.model_dump(mode="json")}
            for run in runs
        ],
    }
    return json.dumps(report, indent=2) + "\n"


def _weighted_in(folders: Sequence[Path]) -> Iterator[Path]:
    """The weighted dataset of each folder that has one."""
    for folder in folders:
        found = (folder / name for name in _WEIGHTED if (folder / name).is_file())
        yield from islice(found, 1)


def read_confidences(path: Path) -> NDArray[np.float32]:
    """The confidence column of a weighted dataset. Raises: DatasetError if a row has none."""
    values = [*UnusedRows().used(file_rows(path), path, lambda _, row: confidence_in(row))]
    if not values:
        raise DatasetError(f"{path}: holds no pairs")
    return np.asarray(values, dtype=np.float32)


def _measured(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs that evaluated an annotator; without any, those whose training measured one."""
    found = [run for run in runs if run.measured is not None]
    evaluations = [run for run in found if run.record.kind == "evaluate-annotator"]
    return evaluations or found


def _best(evaluations: Sequence[PolicyRun]) -> tuple[str, PolicyMetrics] | None:
    """The policy of the highest GRA in the latest evaluation that has a comparison."""
    for evaluation in reversed(evaluations):
        compared = [item for item in evaluation.policies.items() if item[1].comparison is not None]
        if compared:
            return max(compared, key=lambda item: item[1].win_share)
    return None


def _temperature(runs: Sequence[FinishedRun]) -> JsonValue:
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


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("cwpo_trainer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["figure"] = three_digits
    environment.filters["duration"] = duration
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}"
    environment.filters["count"] = lambda number: f"{number:,.0f}"
    return environment.get_template("report.html")


def duration(seconds: float) -> str:
    """Such as "2 h 5 min", "7 min" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
