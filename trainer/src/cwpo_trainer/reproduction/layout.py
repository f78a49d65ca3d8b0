"""The table of a recipe in the paper's layout: the paper's figures above ours."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich.table import Table

from cwpo_trainer.reproduction.results import Results, RowResult

AVERAGE = "Avg."
_NOTHING = "–"


def table_of(results: Results, *, averages: bool, spread_of_thirds: bool) -> Table:
    """The table; in each cell the paper's figure, and below it ours.

    Args:
        averages: whether each block ends with the means over its lines.
        spread_of_thirds: ± is the spread within a run rather than that over seeds.
    """
    columns = [*dict.fromkeys(row.column for row in results.rows)]
    table = Table("", "", *columns, title=f"{results.title}: {results.measure}", show_lines=True)
    blocks = dict.fromkeys(row.line[0] for row in results.rows)
    for block in blocks:
        lines = [*dict.fromkeys(row.line for row in results.rows if row.line[0] == block)]
        for line in lines:
            cells = (_cell(_at(results, line, each), spread_of_thirds) for each in columns)
            table.add_row(line[0] if line == lines[0] else "", line[1], *cells)
        if averages and len(lines) > 1:
            table.add_row("", AVERAGE, *_averages(results, block, columns))
    return table


def notes(results: Results) -> Iterator[str]:
    """What the table does not say: why rows are not run or have failed."""
    yield "upper figure: the paper; lower figure: this run, mean ± deviation [95 % interval]"
    for why in dict.fromkeys(row.missing for row in results.rows if row.missing):
        count = sum(row.missing == why for row in results.rows)
        yield f"{_NOTHING}: {count} of {len(results.rows)} rows are not run: {why}"
    for row in results.rows:
        for seed, why in row.failed.items():
            yield f"failed: {' / '.join(row.line)} / {row.column}, seed {seed}: {why}"


def average(rows: Sequence[RowResult]) -> tuple[float | None, float | None]:
    """The means of the paper's and of our figures over the rows; None unless all are there."""
    return _mean([row.paper for row in rows]), _mean([row.mean for row in rows])


def _averages(results: Results, block: str, columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        rows = [row for row in results.rows if row.line[0] == block and row.column == column]
        paper, ours = average(rows)
        yield f"{_number(paper)}\n{_number(ours)}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def _at(results: Results, line: tuple[str, str], column: str) -> RowResult | None:
    return next((row for row in results.rows if (row.line, row.column) == (line, column)), None)


def _cell(row: RowResult | None, spread_of_thirds: bool) -> str:
    if row is None:
        return ""
    paper = _with_spread(row.paper, row.paper_spread)
    spread = row.spread if spread_of_thirds else row.deviation
    ours = _with_spread(row.mean, spread)
    if row.interval is not None:
        ours += f"\n[dim]\\[{_number(row.interval[0])}, {_number(row.interval[1])}][/]"
    return f"{paper}\n{ours}"


def _with_spread(value: float | None, spread: float | None) -> str:
    return _number(value) if spread is None else f"{_number(value)} ± {_number(spread)}"


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    # Shares are in per cent; confidences are below 1.
    return f"{value:.3f}" if abs(value) < 1 else f"{value:,.1f}"
