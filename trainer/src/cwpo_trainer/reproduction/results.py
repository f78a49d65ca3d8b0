"""The results of a recipe: a figure for each row and seed, kept in a file once it is there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cwpo.errors import DatasetError, mistake_in
from cwpo.partial_file import partial_file
from cwpo_trainer.reproduction.readings import Figure, Reading
from cwpo_trainer.reproduction.recipe import Row
from cwpo_trainer.run.folder import read_record

RESULTS_NAME = "results.json"


class Measured(BaseModel):
    """What one seed gave.

    made_by: the outputs that it was read from: others would be another figure.
    """

    model_config = ConfigDict(extra="forbid")

    seed: int
    value: float
    low: float | None
    high: float | None
    spread: float | None
    made_by: list[str]


class RowResult(BaseModel):
    """A row of the table. failed: by seed, why there is no figure."""

    model_config = ConfigDict(extra="forbid")

    line: tuple[str, str]
    column: str
    paper: float | None
    paper_spread: float | None = None
    missing: str = ""
    measured: list[Measured] = []
    failed: dict[int, str] = {}

    @property
    def mean(self) -> float | None:
        """Over the seeds."""
        return statistics.mean(one.value for one in self.measured) if self.measured else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        values = [one.value for one in self.measured]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def spread(self) -> float | None:
        """Mean of what each seed has behind its ±."""
        spreads = [one.spread for one in self.measured if one.spread is not None]
        return statistics.mean(spreads) if spreads else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean of the seeds' 95 % intervals: seeds measure on much the same pairs."""
        lows = [one.low for one in self.measured if one.low is not None]
        highs = [one.high for one in self.measured if one.high is not None]
        return (statistics.mean(lows), statistics.mean(highs)) if lows and highs else None


class Results(BaseModel):
    """results.json."""

    model_config = ConfigDict(extra="forbid")

    recipe: str
    title: str
    measure: str
    scale: str
    rows: list[RowResult]

    def row(self, row: Row) -> RowResult:
        """That of a row, added where it is missing."""
        for found in self.rows:
            if (found.line, found.column) == (row.line, row.column):
                return found
        added = RowResult(
            line=row.line,
            column=row.column,
            paper=row.paper,
            paper_spread=row.paper_spread,
            missing=row.missing,
        )
        self.rows.append(added)
        return added

    def write(self, folder: Path) -> None:
        """Write the file, as a whole."""
        with partial_file(folder / RESULTS_NAME) as sink:
            sink.write((self.model_dump_json(indent=2) + "\n").encode())


def read_results(folder: Path) -> Results | None:
    """What an earlier run has left; None for nothing. Raises: DatasetError for a broken file."""
    path = folder / RESULTS_NAME
    try:
        return Results.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DatasetError(f"{path}: {mistake_in(error)}: remove it to measure anew") from error


def made_by(readings: Sequence[Reading]) -> list[str]:
    """The names of the outputs that the readings are of."""
    return [reading.step.name for reading in readings]


def read_all(readings: Sequence[Reading], seed: int, root: Path) -> Measured:
    """The mean of the readings, whose steps are done. Raises: DatasetError."""
    figures: list[Figure] = []
    for reading in readings:
        folder = reading.step.path(root)
        try:
            figures.append(reading.read(read_record(folder)))
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{folder}: run.json lacks what is read from it: {error}") from error

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.mean(known) if len(known) == len(values) else None

    return Measured(
        seed=seed,
        value=statistics.mean(figure.value for figure in figures),
        low=mean([figure.low for figure in figures]),
        high=mean([figure.high for figure in figures]),
        spread=mean([figure.spread for figure in figures]),
        made_by=made_by(readings),
    )
