"""The finished runs that a page reports on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cwpo.errors import DatasetError
from cwpo_trainer.evaluation.metrics import (
    AnnotatorMetrics,
    Assessment,
    LlmJudgement,
    PolicyMetrics,
    Writing,
)
from cwpo_trainer.run.folder import (
    LOG_NAME,
    RECORD_NAME,
    SAMPLES_NAME,
    RunRecord,
    read_lines,
    read_record,
)


@dataclass(frozen=True)
class FinishedRun:
    """The output folder of one finished command."""

    name: str
    folder: Path
    record: RunRecord

    @property
    def log(self) -> list[dict[str, Any]]:
        """The steps of its training log."""
        return [line for line in read_lines(self.folder / LOG_NAME) if "loss" in line]

    @cached_property
    def measured(self) -> AnnotatorMetrics | None:
        """The figures of an annotator: of its evaluation, or from the end of its training."""
        results: Any = self.record.results
        if self.record.kind == "evaluate-annotator":
            return AnnotatorMetrics.model_validate(results)
        if self.record.kind == "train-annotator" and "held_out" in results:
            return AnnotatorMetrics.model_validate(results["held_out"])
        return None

    @cached_property
    def assessed(self) -> Assessment | None:
        """Which labels can be trusted; evaluations of earlier versions do not tell."""
        if self.record.kind == "evaluate-annotator" and "verdict" in self.record.results:
            return Assessment.model_validate(self.record.results)
        return None


class PolicyRun:
    """An evaluation of policies."""

    def __init__(self, run: FinishedRun) -> None:
        self.name = run.name
        self.results: dict[str, Any] = {**run.record.results}
        self.policies = {
            name: PolicyMetrics.model_validate(item)
            for name, item in self.results["policies"].items()
        }
        self.samples = read_lines(run.folder / SAMPLES_NAME)

    @property
    def verdict(self) -> list[str]:
        """Its sentences; evaluations of earlier versions have none."""
        return [*self.results.get("verdict", [])]

    @property
    def baseline(self) -> str:
        """Name of the model that the policies are compared with."""
        return str(self.results.get("baseline", "reference"))

    @cached_property
    def by_llm(self) -> LlmJudgement | None:
        """What an LLM judge said, if one was asked."""
        found = self.results.get("llm_judge")
        return None if found is None else LlmJudgement.model_validate(found)

    @property
    def reference_writing(self) -> Writing | None:
        """How the reference writes."""
        found = self.results.get("reference_writing")
        return None if found is None else Writing.model_validate(found)

    def gaps(self, name: str) -> list[float]:
        """Score of a policy's answer less that of the baseline's, where both have one; sorted."""
        return sorted(self._gaps(name))

    def _gaps(self, name: str) -> Iterator[float]:
        for sample in self.samples:
            pair = [sample["answers"].get(each, {}).get("score") for each in (name, self.baseline)]
            if None not in pair:
                yield pair[0] - pair[1]


def finished_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs in and below the folders, in the order in which they were started.

    Raises: DatasetError for a folder that does not exist, and for a run.json that cannot be read.
    """
    found: dict[Path, FinishedRun] = {}
    for folder in folders:
        if not folder.is_dir():
            raise DatasetError(f"{folder}: no such folder")
        for path in folder.rglob(RECORD_NAME):
            output = path.parent
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                name = _name(output, folder, is_one=len(folders) == 1)
                found.setdefault(output.resolve(), FinishedRun(name, output, read_record(output)))
    return sorted(found.values(), key=lambda run: run.record.started_at)


def _name(output: Path, folder: Path, *, is_one: bool) -> str:
    """Of a run, by its path below the folder; behind the folder's name if there are several."""
    below = [] if output == folder else [*output.relative_to(folder).parts]
    above = [] if is_one and below else [folder.resolve().name]
    return "/".join([*above, *below])
