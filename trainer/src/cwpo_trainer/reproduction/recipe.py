"""A recipe: the rows of a table or figure, and how each figure in it comes about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cwpo_trainer.reproduction.published import Line, Table
from cwpo_trainer.reproduction.readings import Reading
from cwpo_trainer.reproduction.scale import Scale
from cwpo_trainer.reproduction.step import in_order

Drawing = Literal["bars", "lines"]
# What is read, by seed; several readings are averaged.
Readings = Callable[[int], tuple[Reading, ...]]


@dataclass(frozen=True)
class Row:
    """One figure of a table: a run of the method, or of what it is compared with.

    line, column: its place in the table.
    readings: None where it is not run at this scale.
    missing: why not.
    paper: the paper's figure; paper_spread: what stands behind its ±.
    """

    line: Line
    column: str
    readings: Readings | None
    missing: str = ""
    paper: float | None = None
    paper_spread: float | None = None

    @property
    def name(self) -> str:
        """For the user."""
        return " / ".join([*(word for word in self.line if word), self.column])


@dataclass(frozen=True)
class Recipe:
    """A table or figure of the paper, or one of ours.

    measure: what its figures are, with the unit.
    rows: of a scale, in the order of lines and columns.
    averages: whether the mean over the lines of a block is shown, as the paper does.
    drawing: how it is drawn, if it is.
    spread_of_thirds: the ± is that over thirds of the prompts, as in Table 20, not over seeds.
    is_the_papers: whether the paper has it.
    """

    name: str
    title: str
    measure: str
    rows: Callable[[Scale], Sequence[Row]]
    averages: bool = False
    drawing: Drawing | None = None
    spread_of_thirds: bool = False
    is_the_papers: bool = True

    def minutes(self, scale: Scale, seeds: int) -> float | None:
        """Expected time of all rows; None at a scale of which nothing is known."""
        if not scale.minutes:
            return None
        readings = [
            reading
            for row in self.rows(scale)
            if row.readings is not None
            for seed in range(seeds)
            for reading in row.readings(seed)
        ]
        steps = in_order([reading.step for reading in readings])
        return sum(scale.minutes.get(step.command, 0.0) for step in steps)


def rows_of(table: Table, at: Callable[[Line, str], Readings | str]) -> list[Row]:
    """A row for each figure of a table.

    Args:
        at: by line and column how the figure comes about, or why it is not run at this scale.
    """
    rows = []
    for line in table.lines:
        for column in table.columns:
            found = at(line, column)
            rows.append(
                Row(
                    line,
                    column,
                    None if isinstance(found, str) else found,
                    found if isinstance(found, str) else "",
                    table.figure(line, column),
                    table.spread(line, column),
                )
            )
    return rows
