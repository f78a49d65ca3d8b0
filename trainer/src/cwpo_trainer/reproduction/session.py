"""`cwpo reproduce`: the rows of a recipe, one after the other."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from cwpo.errors import ConfigError, CwpoError
from cwpo_trainer.report.figures import by_column
from cwpo_trainer.reproduction.catalogue import RECIPES, recipe_named
from cwpo_trainer.reproduction.execution import (
    STEPS,
    Runner,
    StepError,
    ending_with_sigterm,
    shown,
)
from cwpo_trainer.reproduction.layout import notes, table_of
from cwpo_trainer.reproduction.readings import Reading
from cwpo_trainer.reproduction.recipe import Recipe, Row
from cwpo_trainer.reproduction.results import (
    Measured,
    Results,
    RowResult,
    made_by,
    read_all,
    read_results,
)
from cwpo_trainer.reproduction.scale import Scale, scale_of, small
from cwpo_trainer.reproduction.step import Step, in_order
from cwpo_trainer.settings.reproduction import Reproduction

FIGURE_NAME = "figure.svg"
TABLE_NAME = "table.txt"
# Of a table in a file.
_WIDTH = 200


def reproduce(settings: Reproduction) -> None:
    """List recipes, print the commands or results of one, or run it and print its table.

    Raises: ConfigError before anything runs; CwpoError at the end if a row has failed.
    """
    if settings.list or settings.name is None:
        Console().print(_listed(settings))
        return
    recipe = recipe_named(settings.name)
    if settings.show:
        _print(recipe, _found(recipe, settings), Console())
        return
    scale = scale_of(settings)
    rows = recipe.rows(scale)
    _check(rows, settings)
    if settings.dry_run:
        print("\n".join(_plan(recipe, rows, scale, settings)))
        return
    if scale.has_gpus:
        _expect_gpu()
    with ending_with_sigterm():
        run_rows(recipe, rows, settings)


def _listed(settings: Reproduction) -> Table:
    table = Table(
        "recipe", "what", "rows", f"expected hours, {settings.seeds} seeds, small", box=None
    )
    scale = small(settings)
    for recipe in RECIPES.values():
        rows = recipe.rows(scale)
        run = sum(row.readings is not None for row in rows)
        minutes = recipe.minutes(scale, settings.seeds)
        time = f"{minutes / 60:.1f}" if minutes else "–"
        ours = "" if recipe.is_the_papers else " (ours)"
        table.add_row(recipe.name, recipe.title + ours, f"{run} of {len(rows)}", time)
    return table


def _steps(rows: Sequence[Row], seeds: int) -> list[Step]:
    """All steps of the rows, each after its inputs."""
    return in_order(
        [
            reading.step
            for seed in range(seeds)
            for row in rows
            if row.readings is not None
            for reading in row.readings(seed)
        ]
    )


def _check(rows: Sequence[Row], settings: Reproduction) -> None:
    """Raises: ConfigError for settings that a command would refuse, or if no row can be run."""
    steps = _steps(rows, settings.seeds)
    if not steps:
        why = "; ".join(dict.fromkeys(row.missing for row in rows))
        raise ConfigError(f"no row of {settings.name} can be run at this scale: {why}")
    # Some settings ask for their inputs, which are still to be made.
    with TemporaryDirectory() as stand_in:
        for step in steps:
            step.parsed(Path(stand_in))
            step.path(Path(stand_in)).mkdir()


def _plan(
    recipe: Recipe, rows: Sequence[Row], scale: Scale, settings: Reproduction
) -> Iterator[str]:
    """A shell script of all commands; comments say which row each set of them completes."""
    root = settings.output / STEPS
    steps = _steps(rows, settings.seeds)
    yield f"# {recipe.name}: {recipe.title}; {recipe.measure}"
    yield f"# scale {scale.name}, {settings.seeds} seeds, {len(steps)} commands"
    for what, names in _needed(steps).items():
        yield f"# {what}: {', '.join(names)}"
    if scale.has_gpus:
        most = max(step.gpus for step in steps)
        yield f"# GPUs with 80 GB: 1{'' if most == 1 else f', {most} where torchrun is used'}"
    for why in dict.fromkeys(row.missing for row in rows if row.missing):
        yield f"# not run: {why}"
    told: set[str] = set()
    for seed in range(settings.seeds):
        for row in rows:
            if row.readings is None:
                continue
            yield f"\n# {row.name}, seed {seed}"
            for step in in_order([reading.step for reading in row.readings(seed)]):
                if step.name not in told:
                    told.add(step.name)
                    yield shown(step, root)


def _needed(steps: Sequence[Step]) -> dict[str, list[str]]:
    """The models, judges and data sets that come from elsewhere."""

    def given(*names: str) -> list[str]:
        values = (step.settings.get(name) for step in steps for name in names)
        return sorted({value for value in values if isinstance(value, str)})

    hosted = {step.serves for step in steps if isinstance(step.serves, str)}
    sources = [step.settings.get("sources", {}) for step in steps]
    mixed = {each for source in sources for each in source if isinstance(each, str)}
    needed = {
        "models": given("model"),
        "judges": sorted({*given("annotator"), *hosted}),
        "data": sorted({*given("data"), *mixed}),
    }
    return {what: names for what, names in needed.items() if names}


def _expect_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "--scale paper needs a GPU, and there is none: print its commands with --dry-run, or "
            "run --scale small"
        )


def run_rows(recipe: Recipe, rows: Sequence[Row], settings: Reproduction) -> None:
    """Run the rows with each seed, print the table and write it with results.json and the drawing.

    Raises: CwpoError at the end if a row has failed; what is done is kept.
    """
    folder, root = _folder(recipe, settings), settings.output / STEPS
    results = _started(recipe, rows, settings, read_results(folder))
    left = _unmeasured(rows, results, settings.seeds)
    outcome: dict[str, StepError | None] = {}
    steps = in_order([reading.step for each in left for reading in each.readings])
    with closing(Runner(root, at_once=settings.parallel).run(steps)) as ended:
        for step, error in ended:
            outcome[step.name] = error
            for each in [each for each in left if outcome.keys() >= set(made_by(each.readings))]:
                left.remove(each)
                _measure(each, results.row(each.row), outcome, root)
                results.write(folder)
    _show(recipe, results, folder)
    failed = sum(len(row.failed) for row in results.rows)
    if failed:
        raise CwpoError(f"{failed} rows have failed, as said above; run it again to repeat them")


def _folder(recipe: Recipe, settings: Reproduction) -> Path:
    return settings.output / f"{recipe.name}-{settings.scale}"


def _found(recipe: Recipe, settings: Reproduction) -> Results:
    """What earlier runs have left. Raises: ConfigError for nothing."""
    folder = _folder(recipe, settings)
    found = read_results(folder)
    if found is None:
        raise ConfigError(f"{folder} holds no results: name another --output, or run the recipe")
    return found


def _started(
    recipe: Recipe, rows: Sequence[Row], settings: Reproduction, earlier: Results | None
) -> Results:
    """The results to go on with: of an earlier run those that the same settings would give."""
    results = Results(
        recipe=recipe.name,
        title=recipe.title,
        measure=recipe.measure,
        scale=settings.scale,
        rows=[],
    )
    for row in rows:
        added = results.row(row)
        if earlier is not None and row.readings is not None:
            added.measured = [
                one
                for one in earlier.row(row).measured
                if one.made_by == made_by(row.readings(one.seed))
            ]
    return results


@dataclass(frozen=True)
class _Unmeasured:
    """A row that has no figure of a seed yet, and what that is read from."""

    row: Row
    seed: int
    readings: Sequence[Reading]


def _unmeasured(rows: Sequence[Row], results: Results, seeds: int) -> list[_Unmeasured]:
    return [
        _Unmeasured(row, seed, row.readings(seed))
        for seed in range(seeds)
        for row in rows
        if row.readings is not None and seed not in {one.seed for one in results.row(row).measured}
    ]


def _measure(
    one: _Unmeasured, result: RowResult, outcome: Mapping[str, StepError | None], root: Path
) -> None:
    """Read a figure whose steps have ended; what has failed is noted, and others go on."""
    name = f"{one.row.name}, seed {one.seed}"
    error = next((outcome[each] for each in made_by(one.readings) if outcome[each]), None)
    if error is not None:
        result.failed[one.seed] = str(error)
        print(f"{name} has failed: {error}", flush=True)
        return
    measured = read_all(one.readings, one.seed, root)
    result.measured = sorted([*result.measured, measured], key=lambda each: each.seed)
    print(f"{name}: {_told(measured)}", flush=True)


def _told(measured: Measured) -> str:
    interval = ""
    if measured.low is not None and measured.high is not None:
        interval = f" [{measured.low:.1f}, {measured.high:.1f}]"
    return f"{measured.value:.3g}{interval}"


def _show(recipe: Recipe, results: Results, folder: Path) -> None:
    """Print the table, and write it and its drawing into the folder."""
    text = io.StringIO()
    for console in (Console(), Console(file=text, width=_WIDTH)):
        _print(recipe, results, console)
    (folder / TABLE_NAME).write_text(text.getvalue())
    if recipe.drawing is not None:
        (folder / FIGURE_NAME).write_text(_drawn(recipe, results))
    print(folder)


def _print(recipe: Recipe, results: Results, console: Console) -> None:
    how = {"averages": recipe.averages, "spread_of_thirds": recipe.spread_of_thirds}
    console.print(table_of(results, **how))
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def _drawn(recipe: Recipe, results: Results) -> str:
    columns = [*dict.fromkeys(row.column for row in results.rows)]
    lines = [*dict.fromkeys(row.line for row in results.rows if row.measured)]
    ours, papers = {}, {}
    for line in lines:
        of_line = {row.column: row for row in results.rows if row.line == line}
        name = " / ".join(line)
        ours[name] = [
            (of_line[each].mean, of_line[each].interval) if each in of_line else (None, None)
            for each in columns
        ]
        papers[name] = [of_line[each].paper if each in of_line else None for each in columns]
    return by_column(columns, ours, papers, recipe.measure, bars=recipe.drawing == "bars")
